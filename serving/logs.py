"""One JSON object a log line. Only fields named here leave the process: no prompt, no key.

What a record says beyond its message comes from `extra=`, and passes by name through an allow list.
Of an exception only its type and where it was raised are written, never its message, which may
quote what a client sent. A traceback holds source lines, not values.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from types import TracebackType
from typing import TextIO

FIELDS = frozenset(
    {
        "request_id",
        "model",
        "region",
        "replica",
        "rank",
        "step",
        "status",
        "outcome",
        "trace_id",
        "blocks",
        "aborted",
        "prompt_tokens",
        "output_tokens",
        "cached_tokens",
        "duration_ms",
        "ttft_ms",
        "pick_ms",
        "submit_ms",
        "queue_ms",
        "prefill_ms",
        "refusals",
    }
)
PACKAGES = ("serving", "cluster", "kernels", "autoscaler")


class JsonFormatter(logging.Formatter):
    """`time`, `level`, `logger`, `message`, then the static fields and the record's own allowed extras."""

    def __init__(self, static_fields: dict[str, str]) -> None:
        super().__init__()
        unknown = set(static_fields) - FIELDS
        assert not unknown, f"not allowed in a log line: {sorted(unknown)}"
        self._static = static_fields

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._static,
        }
        line.update((name, value) for name, value in record.__dict__.items() if name in FIELDS)
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = type(record.exc_info[1]).__name__
            line["raised_at"] = _frames(record.exc_info[2])
        return json.dumps(line, default=str, ensure_ascii=False)


def configure(level: str, *, stream: TextIO | None = None, **static_fields: str) -> None:
    """Log our packages at `level` to `stream` (standard error), with `static_fields` in each line.

    Only our own loggers are touched: Ray's and the libraries' stay as they are. Calling it again
    replaces what it set before.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(static_fields))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False


def _utc(unix_s: float) -> str:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s))
    return f"{whole}.{int(unix_s % 1 * 1000):03d}Z"


def _frames(trace: TracebackType | None) -> list[str]:
    """Where an exception came through, innermost last: file, line and function."""
    frames = traceback.extract_tb(trace)
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
