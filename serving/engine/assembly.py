"""Puts an engine together over an executor: for a replica's rank 0, and for whoever runs it by hand."""

from __future__ import annotations

import time
from collections.abc import Callable

from serving.engine.block_pool import BlockPool
from serving.engine.engine import Engine, EngineIdentity
from serving.engine.executor import Executor
from serving.engine.governor import Governor
from serving.engine.host_tier import HostTier
from serving.engine.limits import SchedulerLimits
from serving.engine.machine import Machine
from serving.engine.scheduler import Scheduler
from serving.engine.step_time import StepTimeModel
from serving.model_spec import ModelSpec


def build_engine(
    executor: Executor,
    spec: ModelSpec,
    limits: SchedulerLimits,
    identity: EngineIdentity,
    *,
    block_tokens: int,
    kv_dtype: str,
    num_blocks: int | None = None,
    tpot_ms: float | None = None,
    machine: Machine | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Engine:
    """An engine of its own, empty block pool over `executor`.

    `block_tokens` and `kv_dtype` are the executor's. `num_blocks` leaves a part of its KV pool unused;
    by default all of it is used. With `tpot_ms` a governor keeps the time between a request's tokens within
    it. `machine` is what was measured of it.
    """
    num_blocks = executor.num_blocks if num_blocks is None else num_blocks
    assert 0 < num_blocks <= executor.num_blocks
    host = HostTier(executor.num_host_blocks) if executor.num_host_blocks else None
    scheduler = Scheduler(BlockPool(num_blocks, block_tokens, host), limits)
    governor = None
    if tpot_ms is not None:
        governor = Governor(tpot_ms, limits.max_step_tokens, limits.max_num_seqs)
    step_time = StepTimeModel(spec, kv_dtype, machine, executor.bytes_per_weight)
    return Engine(scheduler, executor, step_time, identity, clock, governor)
