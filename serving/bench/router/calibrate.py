"""The simulator beside the real engine."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from serving.errors import ConfigError


def calibrate(console: Console, json_file: Path | None) -> None:
    """Compare simulated times with the real engine's on this machine."""
    raise ConfigError("--calibrate: this build has no calibration against the real engine")
