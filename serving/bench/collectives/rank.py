"""`python -m serving.bench.collectives.rank RANK RANKS PORT DEVICE LARGEST`: one rank of a measurement.

Rank 0 prints a line of JSON a size and way: "eager", a call from the host for every sum, and on a GPU
"graph", the sums of a captured graph, as a decode step holds them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

SMALLEST_BYTES, SIZE_FACTOR = 1 << 10, 4
_TIMEOUT = timedelta(seconds=120)
_WARMUPS = 5
_TRIES = 5
_CALLS = 20  # of a try, and sums in a graph
_FEW_CALLS, _LARGE_BYTES = 4, 1 << 24
_DTYPE = torch.bfloat16


def main(rank: int, ranks: int, port: int, device: str, largest_bytes: int) -> None:
    """Join the others, measure every size, and leave."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=ranks,
        timeout=_TIMEOUT,
    )
    for size in sizes(largest_bytes):
        tensor = torch.zeros(size // _DTYPE.itemsize, dtype=_DTYPE, device=device)
        for way, seconds in _measure(tensor, device):
            if rank == 0:
                print(json.dumps({"way": way, "bytes": size, "us": seconds * 1e6}), flush=True)
    dist.destroy_process_group()


def sizes(largest_bytes: int) -> Iterator[int]:
    """Bytes, from 1 KiB on, each four times the one before."""
    size = SMALLEST_BYTES
    while size <= largest_bytes:
        yield size
        size *= SIZE_FACTOR


def _measure(tensor: torch.Tensor, device: str) -> Iterator[tuple[str, float]]:
    calls = _CALLS if tensor.nbytes < _LARGE_BYTES else _FEW_CALLS

    def sums() -> None:
        for _ in range(calls):
            dist.all_reduce(tensor)

    yield "eager", _median_s(sums, device) / calls
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            sums()
        yield "graph", _median_s(graph.replay, device) / calls


def _median_s(run: Callable[[], object], device: str) -> float:
    """Of tries that all ranks begin together."""
    times_s = []
    for _ in range(_WARMUPS + _TRIES):
        dist.barrier()
        _finish(device)
        started_s = time.perf_counter()
        run()
        _finish(device)
        times_s.append(time.perf_counter() - started_s)
    return sorted(times_s[_WARMUPS:])[_TRIES // 2]


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
