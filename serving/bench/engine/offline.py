"""The engine in this process, given requests and run to their end, with every step recorded."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from kernels.cpu import library
from serving.bench.engine.timed_executor import TimedExecutor
from serving.block_hash import hash_root
from serving.config import parse_config
from serving.engine.assembly import build_engine
from serving.engine.engine import Engine, EngineIdentity
from serving.engine.executor import Executor, ExecutorOptions, KvDTypeName, RandomWeights
from serving.engine.limits import SchedulerLimits
from serving.engine.machine import Machine
from serving.engine.native_runner import precision_of
from serving.engine.worker import Worker
from serving.errors import ConfigError
from serving.messages import Refused, SamplingParams, StepFrame, StepStats, Submit
from serving.model_files import ModelFiles, resolve
from serving.model_spec import ModelSpec, read_model_spec

IDENTITY = EngineIdentity(replica_id="bench", model="bench", region="local", epoch=1)


@dataclass(frozen=True)
class EngineSetup:
    """What is benched: the model and the engine's sizes. None is the engine's own default.

    With `random_weights` the source is a folder that needs no more than a config.json.
    """

    source: str = "embedded"
    dtype: str = "auto"
    kv_dtype: KvDTypeName = "auto"
    device: Literal["cpu", "cuda"] = "cpu"
    random_weights: bool = False
    threads: int | None = None
    kv_blocks: int | None = None
    host_kv_bytes: int | None = None
    max_num_seqs: int = 64
    max_step_tokens: int = 512
    block_tokens: int = 16
    tpot_ms: float | None = None


@dataclass(frozen=True)
class BenchRequest:
    """A request whose end-of-sequence token is ignored; it arrives so long after the run's start.

    `reserve_blocks` None reserves its prompt and all of `max_tokens`.
    """

    token_ids: tuple[int, ...]
    max_tokens: int
    arrival_s: float = 0.0
    reserve_blocks: int | None = None
    priority: int = 0
    temperature: float = 0.0  # greedy


@dataclass(frozen=True)
class RequestRecord:
    """What became of a request; times are seconds from the run's start, refusals count as waiting."""

    submitted_s: float
    first_token_s: float
    token_times_s: tuple[float, ...]
    output_ids: tuple[int, ...]
    finish_reason: str
    cached_tokens: int


@dataclass(frozen=True)
class RunRecord:
    """Requests in the order they were given.

    A step's model forward stands at its place in `forward_ms`, which is empty on a GPU: there it runs beside
    the host.
    """

    elapsed_s: float
    requests: tuple[RequestRecord, ...]
    steps: tuple[StepStats, ...]
    forward_ms: tuple[float, ...]


class EngineUnderTest:
    """The real engine over a loaded model. `rebuild` gives it other limits without loading again."""

    engine: Engine

    def __init__(self, setup: EngineSetup) -> None:
        """Load the model. Raises ConfigError or ModelFileError as a replica would."""
        self.setup = setup
        self.files = _config_alone(setup.source) if setup.random_weights else resolve(setup.source)
        self.spec: ModelSpec = read_model_spec(self.files.folder)
        self.dtype = resolved_dtype(setup.dtype, setup.device)
        self.worker = load_worker(setup, self.files, self.spec)
        self.runner: Any = self.worker._runner  # what computes the worker's logits
        self._executor: Executor = self.worker
        self._forward_ms: list[float] = []
        if setup.device == "cpu":
            timed = TimedExecutor(self.worker)
            self._executor, self._forward_ms = timed, timed.forward_ms
        self.rebuild()

    @property
    def precision(self) -> str:
        """The dtype, and that of the KV cache where it is another than usual."""
        kv_dtype = self.setup.kv_dtype
        return self.dtype if kv_dtype == "auto" else f"{self.dtype}, KV {kv_dtype}"

    def __enter__(self) -> EngineUnderTest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model and its KV pool."""
        self.worker.close()
        del self.worker, self.runner, self._executor, self.engine

    def rebuild(
        self,
        *,
        scheduler_limits: SchedulerLimits | None = None,
        num_blocks: int | None = None,
        tpot_ms: float | None = None,
        machine: Machine | None = None,
    ) -> None:
        """A new, empty engine over the same model: nothing cached, nothing learnt of its steps."""
        limits = scheduler_limits or SchedulerLimits(
            max_num_seqs=self.setup.max_num_seqs,
            max_step_tokens=self.setup.max_step_tokens,
            max_context_tokens=self.spec.context_tokens,
        )
        self.num_blocks = num_blocks or self.worker.num_blocks
        self.engine = build_engine(
            self._executor,
            self.spec,
            limits,
            IDENTITY,
            block_tokens=self.setup.block_tokens,
            kv_dtype=self.worker.kv_dtype,
            num_blocks=self.num_blocks,
            tpot_ms=tpot_ms or self.setup.tpot_ms,
            machine=machine,
        )

    def run(
        self, requests: Sequence[BenchRequest], on_step: Callable[[StepFrame], None] | None = None
    ) -> RunRecord:
        """Submit each request at its arrival and step until all have ended.

        Refused ones stand in line, and the first of it is offered again after every step. Raises
        ConfigError when one can never be accepted. `on_step` sees every frame, outside the step's time.
        """
        run = _Run(self, requests)
        while (frame := run.advance()) is not None:
            if on_step is not None:
                on_step(frame)
        return run.record(tuple(self._forward_ms))

    def submit_of(self, request: BenchRequest, request_id: str) -> Submit:
        """The engine's message for `request`."""
        blocks = -(-(len(request.token_ids) + request.max_tokens) // self.setup.block_tokens)
        return Submit(
            request_id=request_id,
            token_ids=request.token_ids,
            sampling=SamplingParams(max_tokens=request.max_tokens, temperature=request.temperature),
            reserve_blocks=blocks if request.reserve_blocks is None else request.reserve_blocks,
            hash_root=hash_root(self.files.name, self.files.weight_version, self.worker.kv_dtype, "bench"),
            priority=request.priority,
        )

    def start_timing(self) -> None:
        self._forward_ms.clear()


def resolved_dtype(dtype: str, device: str = "cpu") -> Any:
    """What a replica would make of a config's `dtype`. Raises ConfigError for one the device has not."""
    return parse_config({"model": {"dtype": dtype}, "engine": {"device": device}}, "--dtype").dtype


def load_worker(setup: EngineSetup, files: ModelFiles, spec: ModelSpec) -> Worker:
    """The model of `setup` in this process, on all cores unless it says otherwise.

    What a replica compiles beside its first requests is compiled before, so that every step is on the
    fast path where there is one.
    """
    options = ExecutorOptions(
        weights=RandomWeights() if setup.random_weights else files.weights,
        spec=spec,
        dtype=resolved_dtype(setup.dtype, setup.device),
        kv_dtype=setup.kv_dtype,
        device=setup.device,
        block_tokens=setup.block_tokens,
        kv_blocks=setup.kv_blocks,
        host_kv_bytes=setup.host_kv_bytes,
        max_step_tokens=setup.max_step_tokens,
        max_num_seqs=setup.max_num_seqs,
        num_threads=setup.threads or available_cores(),
    )
    if precision_of(options) is not None:
        with contextlib.suppress(RuntimeError, OSError):  # the worker tries again, and says why it cannot
            library.build()
    return Worker(options)


def _config_alone(source: str) -> ModelFiles:
    folder = Path(source)
    return ModelFiles(folder.name, folder, (), "random")


def available_cores() -> int:
    """The cores this process may run on."""
    return len(os.sched_getaffinity(0))


@dataclass
class _Live:
    submitted_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    cached_tokens: int = 0


class _Run:
    """One run's line of requests, and what has come back of them."""

    def __init__(self, under_test: EngineUnderTest, requests: Sequence[BenchRequest]) -> None:
        self._engine = under_test.engine
        self._live = [_Live() for _ in requests]
        self._steps: list[StepStats] = []
        order = sorted(range(len(requests)), key=lambda i: requests[i].arrival_s)
        self._coming = deque(
            (requests[i].arrival_s, under_test.submit_of(requests[i], str(i))) for i in order
        )
        self._line: deque[Submit] = deque()  # arrived, not yet accepted
        self._num_running = 0
        under_test.start_timing()
        self._started_s = time.perf_counter()

    def advance(self) -> StepFrame | None:
        """The next frame with anything in it; None when all have ended."""
        while self._coming or self._line or self._num_running:
            self._offer()
            frame = self._engine.step()
            if frame is not None:
                self._take(frame)
                return frame
            if self._coming:
                time.sleep(max(0.0, self._coming[0][0] - self._now_s()))
        return None

    def record(self, forward_ms: tuple[float, ...]) -> RunRecord:
        requests = tuple(
            RequestRecord(
                submitted_s=live.submitted_s,
                first_token_s=live.token_times_s[0] if live.token_times_s else float("nan"),
                token_times_s=tuple(live.token_times_s),
                output_ids=tuple(live.output_ids),
                finish_reason=live.finish_reason,
                cached_tokens=live.cached_tokens,
            )
            for live in self._live
        )
        return RunRecord(self._now_s(), requests, tuple(self._steps), forward_ms)

    def _now_s(self) -> float:
        return time.perf_counter() - self._started_s

    def _offer(self) -> None:
        now_s = self._now_s()
        while self._coming and self._coming[0][0] <= now_s:
            arrival_s, submit = self._coming.popleft()
            self._live[int(submit.request_id)].submitted_s = arrival_s
            self._line.append(submit)
        while self._line:
            (reply,) = self._engine.submit([self._line[0]])
            if isinstance(reply, Refused):
                if reply.permanent or not self._num_running:
                    raise ConfigError(f"request {reply.request_id} can never run here: {reply.why}")
                return
            self._line.popleft()
            self._num_running += 1

    def _take(self, frame: StepFrame) -> None:
        now_s = self._now_s()
        if frame.stats is not None:
            self._steps.append(frame.stats)
        for delta in frame.deltas:
            live = self._live[int(delta.request_id)]
            live.token_times_s += [now_s] * len(delta.token_ids)
            live.output_ids += delta.token_ids
            if delta.times is not None:
                live.cached_tokens = delta.times.cached_tokens
            if delta.finish_reason is not None:
                live.finish_reason = delta.finish_reason
                self._num_running -= 1
