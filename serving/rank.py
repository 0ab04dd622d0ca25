"""One tensor-parallel rank, as the actor that holds its shard. Rank 0 also schedules.

Rank 0 has two threads: the step thread runs the engine, the event loop answers submits and aborts
and streams frames out. The other ranks follow rank 0's plans in a thread, so that their actors
stay answerable. The constructor imports the executor: the only place where torch enters a process.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from serving.config import EngineConfig, ModelConfig
from serving.engine.assembly import build_engine
from serving.engine.engine import Engine, EngineIdentity
from serving.engine.executor import ExecutorOptions
from serving.engine.limits import SchedulerLimits
from serving.errors import ConfigError
from serving.messages import StepFrame, Submit, decode, encode
from serving.model_files import resolve
from serving.model_spec import read_model_spec
from serving.transport import Stream

logger = logging.getLogger(__name__)


class RankIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Which rank of which replica this is."""

    replica_id: str
    region: str
    rank: int
    world_size: int
    ranks_on_node: int
    node_address: str


class RankReady(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank tells of itself once its weights are loaded and its KV pool stands."""

    rank: int
    pid: int
    num_blocks: int
    kv_dtype: str


class Rank:
    """Made light, then `load`ed on all ranks at once, because they meet each other there."""

    def __init__(self, identity: RankIdentity, model: ModelConfig, engine: EngineConfig) -> None:
        self._identity = identity
        self._model = model
        self._config = engine
        self._make_executor = _executor_factory(engine.executor_path)
        self._executor: Any = None
        self._engine: Engine | None = None
        self._frames: Stream[StepFrame] = Stream()
        self._failure: BaseException | None = None

    async def rendezvous(self) -> str:
        """Where the group meets: an address of this rank's node, and a port free on it now."""
        with socket.socket() as probe:
            probe.bind((self._identity.node_address, 0))
            return f"{self._identity.node_address}:{probe.getsockname()[1]}"

    async def load(self, rendezvous: str) -> RankReady:
        """Load the shard, join the group, size the KV pool; on rank 0 also start the step thread."""
        await asyncio.to_thread(self._load, rendezvous)
        if self._engine is not None:
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._run_steps, args=(loop,), name="step", daemon=True).start()
        return RankReady(
            rank=self._identity.rank,
            pid=os.getpid(),
            num_blocks=self._executor.num_blocks,
            kv_dtype=self._executor.kv_dtype,
        )

    def _load(self, rendezvous: str) -> None:
        files = resolve(self._model.source)
        spec = read_model_spec(files.folder)
        config, identity, dtype = self._config, self._identity, self._model.dtype
        assert dtype != "auto", "resolved where the config is known whole"
        self._executor = self._make_executor(
            ExecutorOptions(
                weights=files.weights,
                spec=spec,
                dtype=dtype,
                device=config.device,
                block_tokens=config.block_tokens,
                kv_dtype=config.kv_dtype,
                kv_blocks=config.kv_blocks,
                kv_memory_bytes=config.kv_memory_bytes,
                host_kv_bytes=config.host_kv_bytes,
                max_step_tokens=config.max_step_tokens,
                max_num_seqs=config.max_num_seqs,
                rank=identity.rank,
                world_size=identity.world_size,
                rendezvous=rendezvous,
                num_threads=config.threads or max(1, (os.cpu_count() or 1) // identity.ranks_on_node),
                sleeps=config.sleep_after_s is not None,
                mock=config.mock,
            )
        )
        if identity.rank > 0:
            return
        limits = SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_step_tokens=config.max_step_tokens,
            max_context_tokens=spec.context_tokens,
        )
        self._engine = build_engine(
            self._executor,
            spec,
            limits,
            EngineIdentity(
                replica_id=identity.replica_id,
                model=self._model.name or files.name,
                region=identity.region,
                epoch=time.time_ns() // 1_000_000,
            ),
            block_tokens=config.block_tokens,
            kv_dtype=self._executor.kv_dtype,
            tpot_ms=config.tpot_ms,
            machine=self._executor.measure_machine(),
        )

    def _run_steps(self, loop: asyncio.AbstractEventLoop) -> None:
        """The step thread: publishes a frame a step, until the engine ends or fails."""
        assert self._engine is not None

        def publish(frame: StepFrame) -> None:
            loop.call_soon_threadsafe(self._frames.put, frame)

        try:
            self._engine.run(publish, self._executor.keep_alive, self._config.sleep_after_s)
        except Exception as failure:
            logger.exception("the engine failed")
            self._failure = failure
        finally:
            loop.call_soon_threadsafe(self._frames.close)

    async def frames(self) -> AsyncIterator[bytes]:
        """Every step's news, as encoded lists of StepFrame. Raises when the engine has failed."""
        async for batch in self._frames.batches():
            yield encode(batch)
        if self._failure is not None:
            raise RuntimeError(f"the engine failed: {self._failure}") from self._failure

    async def submit(self, payload: bytes) -> bytes:
        assert self._engine is not None, "only rank 0 takes submissions"
        return encode(self._engine.submit(decode(payload, list[Submit])))

    async def abort(self, request_ids: list[str]) -> None:
        assert self._engine is not None, "only rank 0 takes aborts"
        self._engine.abort(request_ids)

    async def load_report(self) -> bytes:
        assert self._engine is not None, "only rank 0 knows the load"
        return encode(self._engine.load())

    async def block_snapshot(self) -> bytes:
        assert self._engine is not None, "only rank 0 knows the blocks"
        return encode(self._engine.block_snapshot())

    async def follow(self) -> None:
        """Run rank 0's plans until it ends the group; raises when it is gone."""
        await asyncio.to_thread(self._executor.follow)


def _executor_factory(path: str) -> Callable[[ExecutorOptions], Any]:
    module, _, name = path.partition(":")
    try:
        factory: Callable[[ExecutorOptions], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as missing:
        raise ConfigError(f"engine.executor: {path!r} cannot be imported: {missing}") from missing
    return factory
