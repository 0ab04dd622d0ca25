"""Ranks in processes of their own, for tests of tensor parallelism."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.process import BaseProcess

from serving.engine.executor import ExecutorOptions
from serving.engine.worker import Worker
from tests.serving.engine.step_plans import generate

JOIN_S = 60


def free_rendezvous() -> str:
    """A loopback address nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def follow(options: ExecutorOptions) -> None:
    """A rank's whole life; the process exits 0 when rank 0 has stopped it."""
    worker = Worker(options)
    worker.follow()
    worker.close()


def step_and_die(options: ExecutorOptions) -> None:
    """Rank 0 for one step, and then no more: no stop message, no closing of sockets."""
    generate(Worker(options), [[1, 2, 3]], 1, options.block_tokens)
    os._exit(9)


def start(target: object, options: ExecutorOptions) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=(options,), daemon=True)
    process.start()
    return process


@contextmanager
def tensor_parallel(options: ExecutorOptions, world_size: int) -> Iterator[tuple[Worker, list[BaseProcess]]]:
    """Rank 0 here and the others in processes; on leaving they are stopped and must exit 0."""
    options = replace(options, world_size=world_size, rendezvous=free_rendezvous())
    others = [start(follow, replace(options, rank=rank)) for rank in range(1, world_size)]
    worker = Worker(options)
    try:
        yield worker, others
    finally:
        worker.close()
        for process in others:
            process.join(JOIN_S)
    exit_codes = [process.exitcode for process in others]
    assert exit_codes == [0] * len(others), exit_codes
