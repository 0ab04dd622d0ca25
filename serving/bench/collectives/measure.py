"""All-reduces by groups of processes on this machine, and what they make of its links.

    bus bandwidth = 2·(n - 1)/n · bytes / time

It is what each link must carry for the sum of n ranks, whatever the algorithm (NVIDIA, nccl-tests,
PERFORMANCE.md), so it can be held against the fabric's nominal figure. One rank crosses no link.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Literal

import msgspec

from serving.errors import SearoomError

Device = Literal["cpu", "cuda"]
_LIMIT_S = 180


class AllReduce(msgspec.Struct, frozen=True, kw_only=True):
    """The median time of a sum over `ranks`; `nominal_share` where a nominal bandwidth was given."""

    ranks: int
    way: Literal["eager", "graph"]
    bytes: int
    us: float
    bus_bytes_per_s: float
    nominal_share: float | None = None

    @property
    def crosses_links(self) -> bool:
        return self.ranks > 1


def bus_bytes_per_s(ranks: int, num_bytes: int, seconds: float) -> float:
    """The formula above; 0 for one rank."""
    return 2 * (ranks - 1) / ranks * num_bytes / seconds


def measure(
    ranks: int, device: Device, largest_bytes: int, nominal_bytes_per_s: float | None
) -> Iterator[AllReduce]:
    """Every size as it is measured. Raises SearoomError where a rank fails."""
    with tempfile.TemporaryFile("w+") as errors:
        processes = _start(ranks, device, largest_bytes, errors.fileno())
        try:
            assert processes[0].stdout is not None
            for line in processes[0].stdout:
                yield _figures(ranks, json.loads(line), nominal_bytes_per_s)
            codes = [process.wait(_LIMIT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            errors.seek(0)
            words = errors.read().strip().splitlines()
            raise SearoomError(f"ranks ended with {codes}: {words[-1] if words else 'no word'}")


def _start(ranks: int, device: Device, largest_bytes: int, errors: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "serving.bench.collectives.rank",
                *map(str, (rank, ranks, port, device, largest_bytes)),
            ],
            stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        for rank in range(ranks)
    ]


def _figures(ranks: int, found: dict[str, float], nominal_bytes_per_s: float | None) -> AllReduce:
    bus = bus_bytes_per_s(ranks, int(found["bytes"]), found["us"] / 1e6)
    share = bus / nominal_bytes_per_s if nominal_bytes_per_s and ranks > 1 else None
    return AllReduce(**found, ranks=ranks, bus_bytes_per_s=bus, nominal_share=share)  # type: ignore[arg-type]
