"""A real engine in a process of its own, on one core, at the other end of a pipe.

    pipe ─submit, abort, script, renew─► Replica ─► Engine, on its step thread
    pipe ◄─ready, frames, report──────── Replica ◄─ frames

Load reports are made by the production LoadReporter. Of a reply's tokens the first and the last are told
when they come, those in between with the last: whoever listens shares the cores that are measured.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection

import msgspec

from serving.bench.engine.offline import EngineSetup, load_worker
from serving.bench.router.calibration_engine import RecordingStepTime, Script, ScriptedExecutor
from serving.bench.router.calibration_pipe import Pipe
from serving.engine.block_pool import BlockPool
from serving.engine.engine import Engine, EngineIdentity
from serving.engine.executor import Executor
from serving.engine.limits import SchedulerLimits
from serving.engine.scheduler import Scheduler
from serving.load_reporter import LoadReporter
from serving.messages import BlockSnapshot, SequenceDelta, StepFrame, Submit, decode, encode
from serving.model_files import resolve
from serving.model_spec import ModelSpec, read_model_spec
from serving.simulator import MODEL
from serving.transport import DelayLine

REGION = "local"


class ReplicaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica is told at its start. Without a core it runs on any."""

    name: str
    core: int | None = None
    source: str = "embedded"
    block_tokens: int = 16
    num_blocks: int = 768
    max_num_seqs: int = 16
    max_step_tokens: int = 256


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What names blocks and bounds prompts: told when the model is loaded."""

    name: str
    weight_version: str
    kv_dtype: str
    vocab_size: int
    context_tokens: int
    stop_token_id: int


class Replica:
    """What the pipe's other end may ask of an engine. `renew` gives it an empty one that knows its steps."""

    def __init__(
        self, options: ReplicaOptions, executor: Executor, spec: ModelSpec, facts: ModelFacts
    ) -> None:
        self._options = options
        self._facts = facts
        self._executor = ScriptedExecutor(executor)
        self._step_time = RecordingStepTime(spec, executor, facts.kv_dtype)
        self._epoch = 0
        self._running: _Running | None = None

    async def serve(self, connection: Connection) -> None:
        """Until the pipe is closed. Raises what went wrong here."""
        pipe = self._pipe = Pipe(connection, "parent", self._answer)
        pipe.tell("ready", encode(self._facts))
        try:
            await pipe.closed.wait()
        finally:
            if self._running is not None:
                self._running.stop()
        if pipe.failure is not None:
            raise pipe.failure

    async def _answer(self, method: str, payload: bytes) -> bytes:
        if method == "renew":
            return self._renew()
        if method == "script":
            self._executor.follow(decode(payload, list[Script]))
            return b""
        assert self._running is not None, "renew it first"
        if method == "rest":
            self._running.stop()
            return b""
        engine = self._running.engine
        if method == "submit":
            return encode(engine.submit(decode(payload, list[Submit])))
        assert method == "abort"
        engine.abort(decode(payload, list[str]))
        return b""

    def _renew(self) -> bytes:
        if self._running is not None:
            self._running.stop()
        self._epoch += 1
        options = self._options
        limits = SchedulerLimits(options.max_num_seqs, options.max_step_tokens, self._facts.context_tokens)
        engine = Engine(
            Scheduler(BlockPool(options.num_blocks, options.block_tokens), limits),
            self._executor,  # type: ignore[arg-type]  # nobody measures the machine again
            self._step_time,
            EngineIdentity(replica_id=options.name, model=MODEL, region=REGION, epoch=self._epoch),
        )
        learned = self._step_time.take()
        self._running = _Running(engine, self._pipe)
        return encode(learned)


class _Running:
    """An engine with its step thread, and the way of its news to the pipe."""

    def __init__(self, engine: Engine, pipe: Pipe) -> None:
        self.engine = engine
        self._pipe = pipe
        self._is_stopping = False
        self._between: dict[str, list[int]] = {}  # tokens of replies under way that are not told yet
        self._loop = asyncio.get_running_loop()
        self._reporter = LoadReporter(engine.load(), _Upwards(pipe), DelayLine(0.0), self._snapshot)
        self._reporting = asyncio.create_task(self._reporter.run())
        self._thread = threading.Thread(target=self._run, name="step", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self._reporting.cancel()
        self.engine.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            self.engine.run(lambda frame: self._soon(self._deliver, frame))
        finally:
            self._soon(self._ended)

    def _soon(self, act: Callable[..., None], *args: object) -> None:
        if not self._is_stopping:
            self._loop.call_soon_threadsafe(act, *args)

    def _ended(self) -> None:
        if not self._is_stopping:
            self._pipe.close()  # the engine failed, which its thread has told

    def _deliver(self, frame: StepFrame) -> None:
        if self._is_stopping or self._pipe.closed.is_set():
            return
        told = tuple(joined for delta in frame.deltas if (joined := self._joined(delta)) is not None)
        if told:
            self._pipe.tell("frames", encode([StepFrame(step=frame.step, deltas=told)]))
        if frame.block_events is not None:
            self._reporter.blocks_changed(frame.block_events)
        if frame.load is not None:
            self._reporter.changed(frame.load)

    def _joined(self, delta: SequenceDelta) -> SequenceDelta | None:
        """With the tokens kept before, if it is to be told now."""
        if delta.times is not None and delta.finish_reason is None:
            return delta
        kept = self._between.setdefault(delta.request_id, [])
        kept += delta.token_ids
        if delta.finish_reason is None:
            return None
        del self._between[delta.request_id]
        return msgspec.structs.replace(delta, token_ids=tuple(kept))

    async def _snapshot(self) -> BlockSnapshot:
        return self.engine.block_snapshot()


class _Upwards:
    """The Router as a LoadReporter sees it."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    async def call(self, method: str, *args: object) -> bytes:
        (payload,) = args
        assert isinstance(payload, bytes)
        return await self._pipe.call(method, payload)


def main(connection: Connection, payload: bytes) -> None:
    """The process of a replica; `payload` is its ReplicaOptions."""
    options = decode(payload, ReplicaOptions)
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    files = resolve(options.source)
    spec = read_model_spec(files.folder)
    setup = EngineSetup(
        source=options.source, threads=1, kv_blocks=options.num_blocks, block_tokens=options.block_tokens
    )
    worker = load_worker(setup, files, spec)
    facts = ModelFacts(
        name=files.name,
        weight_version=files.weight_version,
        kv_dtype=worker.kv_dtype,
        vocab_size=spec.vocab_size,
        context_tokens=spec.context_tokens,
        stop_token_id=spec.eos_token_ids[0],
    )
    try:
        asyncio.run(Replica(options, worker, spec, facts).serve(connection))
    finally:
        worker.close()
