"""Times and errors of cases, and the ceilings of the machine.

A run is captured into a CUDA graph, so that what is timed is the device and not Python; between runs the
L2 cache is filled with other data, only read, so that nothing is left to be written back; the median counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kernels.bench.case import Case, Peer, Place
from kernels.dispatch import forced
from kernels.gpu.device import LAUNCH_ERRORS

_FLUSH_BYTES = 512 << 20  # many times any GPU's L2 cache
_READ_BYTES = 4 << 30
_SIZE = 8192
_WARMUPS = 3
_TRIES = 30
# What a library raises where it does not have, or not know, what is asked of it.
_PEER_ERRORS = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError)
CASE_ERRORS: tuple[type[Exception], ...] = (*_PEER_ERRORS, LookupError, *LAUNCH_ERRORS)
_FIRST_WORDS = 300  # characters of an error


@dataclass(frozen=True)
class Measured:
    """Times in microseconds, None in a rehearsal; `peers` by name, a time or why there is none."""

    family: str
    shape: str
    error: float
    tolerance: float
    us: float | None
    moved_bytes: int
    flops: int
    bound: str
    peers: dict[str, float | str | None] = field(default_factory=dict)

    @property
    def right(self) -> bool:
        """NaN is wrong."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Ceilings:
    """What this machine gives at best; by `Case.bound`."""

    device: str
    bytes_per_s: float
    flops_per_s: dict[str, float]


def measure_case(family: str, case: Case, place: Place) -> Measured:
    """Error and times of one case; in a rehearsal, that everything runs."""
    with torch.inference_mode():
        with forced("triton"):
            error = _error(case.run(), case)
            us = None if place.tiny else time_us(case.run)
        peers = {peer.name: _peer(peer, place) for peer in case.peers if peer.cpu or not place.tiny}
    return Measured(
        family, case.shape, error, case.tolerance, us, case.moved_bytes, case.flops, case.bound, peers
    )


def measure_ceilings() -> Ceilings:
    """Of the current CUDA device: reading 4 GiB, and square products of 8192."""
    with torch.inference_mode():
        read_us = _read_us()
        products = _product_us()
    rates = {name: 2 * _SIZE**3 / us * 1e6 for name, us in products.items()}
    return Ceilings(torch.cuda.get_device_name(), _READ_BYTES / read_us * 1e6, rates)


def described(error: Exception) -> str:
    """In one line."""
    said = str(error).strip()
    return f"{type(error).__name__}: {said.splitlines()[0][:_FIRST_WORDS] if said else ''}"


def _read_us() -> float:
    buffer = torch.ones(_READ_BYTES // 4, device="cuda")
    return time_us(lambda: buffer.sum())


def _product_us() -> dict[str, float]:
    left, right = (torch.randn(_SIZE, _SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    products = {"bf16": time_us(lambda: left @ right)}
    if torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device="cuda")
        narrow, other = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).T
        products["fp8"] = time_us(lambda: torch._scaled_mm(narrow, other, one, one, out_dtype=torch.bfloat16))
    return products


def time_us(run: Callable[[], object], captures: bool = True) -> float:
    """Median microseconds of `run` with a cold L2 cache."""
    launch = _captured(run) if captures else run
    flush = torch.zeros(_FLUSH_BYTES // 4, device="cuda")
    times = []
    for _ in range(_WARMUPS + _TRIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.sum()  # takes longer than the host needs to launch what follows
        start.record()
        launch()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    ordered = sorted(start.elapsed_time(end) * 1e3 for start, end in times[_WARMUPS:])
    return ordered[len(ordered) // 2]


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARMUPS):  # compiles, and allocates what libraries keep
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _error(actual: torch.Tensor, case: Case) -> float:
    rows = actual if case.rows is None else actual[case.rows]
    expected = case.expected()
    return ((rows.double() - expected).abs().max() / expected.abs().max()).item()


def _peer(peer: Peer, place: Place) -> float | str | None:
    if place.tiny:
        peer.run()
        return None
    try:
        return time_us(peer.run, peer.captures)
    except _PEER_ERRORS as error:
        return described(error)
