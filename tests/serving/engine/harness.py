"""Drives a scheduler with the fake executor, and says what each request must come to."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Collection
from dataclasses import dataclass, field

from serving.engine.block_pool import BlockPool
from serving.engine.executor import Done
from serving.engine.growth import OutputGrowth
from serving.engine.host_tier import HostTier
from serving.engine.limits import SchedulerLimits
from serving.engine.scheduled_step import ScheduledStep, build_plan
from serving.engine.scheduler import MAX_IN_FLIGHT, Scheduler
from serving.engine.sequence import Sequence, SequenceState
from serving.messages import Accepted, SamplingParams, SequenceDelta, Submit, SubmitReply
from tests.fakes import FakeExecutor, fake_next_token

VOCAB_SIZE = 97
ROOT = b"r" * 16


def request(
    request_id: str,
    token_ids: tuple[int, ...],
    max_tokens: int = 8,
    reserve_blocks: int = 0,
    priority: int = 0,
    seed: int = 0,
    stop_token_ids: tuple[int, ...] = (),
    hash_root: bytes = ROOT,
) -> Submit:
    sampling = SamplingParams(max_tokens=max_tokens, seed=seed, stop_token_ids=stop_token_ids)
    return Submit(
        request_id=request_id,
        token_ids=token_ids,
        sampling=sampling,
        reserve_blocks=reserve_blocks,
        hash_root=hash_root,
        priority=priority,
    )


def expected_outputs(
    submit: Submit, capacity_tokens: int, context_tokens: int
) -> tuple[tuple[int, ...], str]:
    """Output ids and finish reason of a request that runs alone and without a cache."""
    tokens = list(submit.token_ids)
    outputs: list[int] = []
    while True:
        token = fake_next_token(tokens, submit.sampling.seed, VOCAB_SIZE)
        tokens.append(token)
        outputs.append(token)
        if token in submit.sampling.stop_token_ids:
            return tuple(outputs), "stop"
        is_long = len(outputs) >= submit.sampling.max_tokens
        if is_long or len(tokens) >= context_tokens or len(tokens) > capacity_tokens:
            return tuple(outputs), "length"


class Blind(OutputGrowth):
    """Expects nobody to go on."""

    def has_room(self, running: Collection[Sequence], waiting: Collection[Sequence]) -> bool:
        return True

    def growth_blocks(self, running: Collection[Sequence], moment: object) -> int:
        return 0


@dataclass
class Harness:
    """One scheduler and executor; integrity is checked after everything that happens."""

    num_blocks: int
    block_tokens: int = 4
    max_num_seqs: int = 8
    max_step_tokens: int = 16
    max_context_tokens: int = 1000
    host_blocks: int = 0
    foresees: bool = False  # else it admits whatever fits now, so that small cases come under pressure
    is_poisoned: Callable[[tuple[int, ...]], bool] = lambda token_ids: False
    runs_ahead: bool = False  # else a step ends before the next begins
    now_s: float = 0.0
    submits: dict[str, Submit] = field(default_factory=dict)
    sequences: dict[str, Sequence] = field(default_factory=dict)  # of the accepted ones
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ends: dict[str, SequenceDelta] = field(default_factory=dict)
    steps: list[ScheduledStep] = field(default_factory=list)
    in_flight: deque[tuple[ScheduledStep, Done]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        limits = SchedulerLimits(self.max_num_seqs, self.max_step_tokens, self.max_context_tokens)
        host = HostTier(self.host_blocks) if self.host_blocks else None
        self.pool = BlockPool(self.num_blocks, self.block_tokens, host)
        foresight = OutputGrowth if self.foresees else Blind
        self.scheduler = Scheduler(self.pool, limits, foresight(self.pool, self.max_context_tokens))
        self.executor = FakeExecutor(
            self.num_blocks,
            self.block_tokens,
            VOCAB_SIZE,
            self.is_poisoned,
            self.runs_ahead,
            self.host_blocks,
        )

    def submit(self, submit: Submit) -> SubmitReply:
        sequence = Sequence.from_submit(submit, self.block_tokens)
        reply = self.scheduler.reserve(sequence, self.now_s)
        if isinstance(reply, Accepted):
            self.submits[submit.request_id] = submit
            self.sequences[submit.request_id] = sequence
            self.outputs[submit.request_id] = ()
        self.scheduler.check_integrity()
        return reply

    def abort(self, request_id: str) -> bool:
        was_live = self.scheduler.abort(request_id)
        self.scheduler.check_integrity()
        return was_live

    def begin(self) -> ScheduledStep | None:
        """Schedule and launch a step and leave it in flight."""
        before = {name: (s.state, s.num_preemptions, s.tokens_when_preempted) for name, s in self._live()}
        running = [s for _, s in self._live() if s.state is SequenceState.RUNNING]
        decoding = {s for s in running if s.is_decoding and not s.is_ending}
        is_ahead = bool(self.in_flight)
        step = self.scheduler.schedule(self.now_s)
        self.scheduler.check_integrity()
        self._check_order({name for name, (state, *_) in before.items() if state is SequenceState.WAITING})
        for name, (_, num_preemptions, tokens_then) in before.items():
            sequence = self.sequences[name]
            if sequence.num_preemptions > num_preemptions > 0:
                assert sequence.tokens_when_preempted > tokens_then, "preempted again without progress"
        if step is None:
            self._take(self.scheduler.take_ends())
            return None
        self.steps.append(step)
        if len(decoding) <= self.max_step_tokens:
            left_out = decoding - {chunk.sequence for chunk in step.chunks}
            assert all(s.state is SequenceState.WAITING for s in left_out), "a decode is left out"
        assert sum(chunk.num_tokens for chunk in step.chunks) <= self.max_step_tokens
        assert all(chunk.num_tokens > 0 for chunk in step.chunks)
        assert not (is_ahead and step.num_preemptions), "preempted without knowing who ends"
        self.in_flight.append((step, self.executor.launch(*build_plan(step, self.block_tokens))))
        return step

    def end(self) -> None:
        step, launched = self.in_flight.popleft()
        self.now_s += 1.0
        self._take(self.scheduler.complete(step, launched.tokens(), self.now_s))
        self.scheduler.check_integrity()

    def step(self) -> bool:
        if not self.in_flight and self.begin() is None:
            return False
        if self.runs_ahead and len(self.in_flight) < MAX_IN_FLIGHT:
            self.begin()
        self.end()
        return True

    def run(self, max_steps: int = 5000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.step():
                break
        assert not self.scheduler.has_work, "somebody starves"
        assert self.ends.keys() == self.submits.keys(), "an accepted request was lost"
        load = self.scheduler.load()
        assert load.blocks_free + load.blocks_evictable == load.blocks_total, "a block leaked"
        assert load.blocks_reserved == 0

    def check_outputs(self) -> None:
        """Everybody who was not aborted got exactly what it gets alone."""
        capacity = self.num_blocks * self.block_tokens
        for request_id, end in self.ends.items():
            outputs, reason = expected_outputs(self.submits[request_id], capacity, self.max_context_tokens)
            if end.finish_reason == "abort":
                assert self.outputs[request_id] == outputs[: len(self.outputs[request_id])]
            else:
                assert (self.outputs[request_id], end.finish_reason) == (outputs, reason)

    def _live(self) -> list[tuple[str, Sequence]]:
        return [(n, s) for n, s in self.sequences.items() if s.state is not SequenceState.FINISHED]

    def _check_order(self, were_waiting: set[str]) -> None:
        """Nobody was admitted past one who stands before it."""
        waiting = [s.order for _, s in self._live() if s.state is SequenceState.WAITING]
        running = [n for n, s in self._live() if s.state is SequenceState.RUNNING]
        admitted = [self.sequences[name].order for name in running if name in were_waiting]
        assert not admitted or not waiting or max(admitted) < min(waiting)

    def _take(self, deltas: tuple[SequenceDelta, ...]) -> None:
        for delta in deltas:
            assert delta.request_id not in self.ends, "news after the end"
            self.outputs[delta.request_id] += delta.token_ids
            if delta.finish_reason is not None:
                self.ends[delta.request_id] = delta
