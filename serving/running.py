"""The state file that tells `status`, `chat` and `down` which cluster `searoom up` is running."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from serving.auth import state_folder
from serving.errors import ConfigError


@dataclass(frozen=True)
class Running:
    """One `searoom up`: its process, and where its parts answer."""

    pid: int
    started_s: float  # the process's start time, so that a reused pid is not mistaken for it
    endpoint: str
    dashboard: str
    model: str
    ray_address: str
    ready: bool = False  # it serves; before that, it is starting

    @classmethod
    def here(cls, *, endpoint: str, dashboard: str, model: str, ray_address: str) -> Running:
        pid = os.getpid()
        return cls(pid, psutil.Process(pid).create_time(), endpoint, dashboard, model, ray_address)

    def alive(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            is_ours = abs(process.create_time() - self.started_s) < 1.0
            return is_ours and process.status() != psutil.STATUS_ZOMBIE  # ended, and not yet reaped
        except psutil.NoSuchProcess:
            return False


def _path() -> Path:
    return state_folder() / "running.json"


def save(running: Running) -> None:
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(running), indent=2))
    fresh.replace(path)


def forget() -> None:
    _path().unlink(missing_ok=True)


def find() -> Running | None:
    """The cluster that is running, or None. A file whose process is dead is removed."""
    try:
        running = Running(**json.loads(_path().read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):  # written by another version, or cut off
        forget()
        return None
    if running.alive():
        return running
    forget()
    return None


def require() -> Running:
    """The cluster that is running, or starting; raises ConfigError when there is none."""
    running = find()
    if running is None:
        raise ConfigError("no cluster of `searoom up` is running here; start one with: searoom up")
    return running
