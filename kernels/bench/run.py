"""Cases in processes that may break."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from kernels.bench.measure import Ceilings, Measured
from kernels.bench.worker import CEILINGS, CONTEXT_LOST

_LIMIT_S = 240.0  # of one process; the compiler's time is in it
_LAST_WORDS = 300  # characters of what a broken process said
_BROKEN_IN_A_ROW = 2  # then it is not the case
_ASKED = "name,driver_version,power.limit,clocks.max.sm,clocks.max.memory"


@dataclass(frozen=True)
class Broken:
    """A case without a result."""

    family: str
    shape: str
    why: str


class _ContextLostError(ChildProcessError):
    """The process ended after a case that had its line."""


def measure_families(families: list[str], *, tiny: bool) -> Iterator[Measured | Broken]:
    """Every case of `families`, in one process, as it is done; after one that broke it, in another."""
    done = in_a_row = 0
    while in_a_row < _BROKEN_IN_A_ROW:
        before = done
        try:
            for one in _results(families, done, tiny=tiny):
                done += 1
                yield Broken(**one) if "why" in one else Measured(**one)
        except _ContextLostError:
            in_a_row = 0
        except ChildProcessError as error:
            in_a_row = in_a_row + 1 if done == before else 1
            rest = "; what comes after it was not run" if in_a_row == _BROKEN_IN_A_ROW else ""
            yield Broken(", ".join(families), f"case {done}", f"{error}{rest}")
            done += 1
        else:
            return


def measure_ceilings() -> Ceilings:
    """Of this machine's GPU. Raises ChildProcessError where even that breaks."""
    return Ceilings(**next(_results([CEILINGS], 0, tiny=False)))


def provenance() -> dict[str, str | None]:
    """What the figures are of: GPU, driver and limits, versions, date and command."""
    tool = shutil.which("nvidia-smi")
    asked = f"--query-gpu={_ASKED}"
    gpu = None
    if tool is not None:
        done = subprocess.run([tool, asked, "--format=csv,noheader"], capture_output=True, text=True)
        gpu = done.stdout.strip() or done.stderr.strip()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "kernels.bench", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton"),
        "cuda": torch.version.cuda,
        f"gpu ({_ASKED})": gpu,
    }


def _results(families: list[str], start: int, *, tiny: bool) -> Iterator[dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "kernels.bench.worker",
        ",".join(families),
        str(start),
        *(["--tiny"] if tiny else []),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if tiny:
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert process.stdout is not None
        limit = threading.Timer(_LIMIT_S, process.kill)
        limit.start()
        try:
            yield from map(json.loads, process.stdout)
        finally:
            is_late = limit.finished.is_set()
            limit.cancel()
            process.stdout.close()
            code = process.wait()
        if code == CONTEXT_LOST:
            raise _ContextLostError
        if code:
            errors.seek(0)
            said = errors.read().strip()
            last = said.splitlines()[-1][-_LAST_WORDS:] if said else "no word"
            late = f" after {_LIMIT_S:.0f} s" if is_late else ""
            raise ChildProcessError(f"exit {code}{late}: {last}")
