"""Cases in processes that may break."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernels.bench.measure import Ceilings, Measured
from kernels.bench.worker import CEILINGS

_LIMIT_S = 240  # of one process; the compiler's time is in it
_LAST_WORDS = 300  # characters of what a broken process said
_BROKEN_IN_A_ROW = 2  # then it is not the case


@dataclass(frozen=True)
class Broken:
    """A case that ended its process."""

    family: str
    index: int
    why: str


def measure_families(families: list[str], *, tiny: bool) -> Iterator[Measured | Broken]:
    """Every case of `families`, in one process, as it is done; after one that broke, the next."""
    start = in_a_row = 0
    while in_a_row < _BROKEN_IN_A_ROW:
        found = 0
        try:
            for one in _results(families, start, tiny=tiny):
                found += 1
                yield Measured(**one)
        except ChildProcessError as error:
            in_a_row = 1 if found else in_a_row + 1
            yield Broken(", ".join(families), start + found, str(error))
            start += found + 1
        else:
            return


def measure_ceilings() -> Ceilings:
    """Of this machine's GPU. Raises ChildProcessError where even that breaks."""
    return Ceilings(**next(_results([CEILINGS], 0, tiny=False)))


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
            limit.cancel()
            process.stdout.close()
            code = process.wait()
        if code:
            errors.seek(0)
            said = errors.read().strip()
            raise ChildProcessError(
                f"exit {code}: {said.splitlines()[-1][-_LAST_WORDS:] if said else 'no word'}"
            )
