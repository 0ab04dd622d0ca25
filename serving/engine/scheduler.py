"""Who computes what in the next step: one token budget, decodes first, prefill chunks in the rest.

A pure state machine: requests and sampled tokens in, steps and deltas out; no clock, no tensors.

    reserve ──► waiting ──admit──► running ──complete──► deltas, the last with a finish reason
                   └──◄── preempt ────┘

A step may be scheduled while the one before is still in flight: what that one draws is a placeholder then,
and what it computes counts as computed, for steps run in the order in which they were scheduled. So a block
that is released while a step in flight still writes to it may be handed out at once.

- A request is accepted when its reservation fits beside all outstanding ones, and beside the growth that
  is foreseen of what runs; one that reserves nothing is only queued. Prefix blocks that it matches are
  held from then on; the rest of the reservation turns into blocks as they are allocated.
- Waiting sequences are admitted strictly in (priority, arrival) order, and get blocks for all their
  known tokens at once: only decodes grow, so a prefill never runs out of blocks half-way. The first
  in line waits while it is foreseen (`growth.py`) that those inside will come to need its room.
- When a decode finds no block, holds of waiting sequences go first, then the running sequence with
  the least computed work in the lowest priority class is preempted: its blocks are released (still
  cached until reallocated) and it computes again what it then lacks. Nobody is preempted a second
  time before it has won a token, so the preemptions are finite and everyone finishes. While a step is in
  flight nobody is preempted: what it draws may end a sequence and make room.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

import msgspec
import numpy as np
from numpy.typing import NDArray

from serving.engine.block_pool import BlockPool
from serving.engine.governor import StepBudget
from serving.engine.growth import OutputGrowth
from serving.engine.holdings import Holdings
from serving.engine.limits import SchedulerLimits
from serving.engine.scheduled_step import Chunk, ScheduledStep
from serving.engine.sequence import Sequence, SequenceState
from serving.messages import Accepted, FinishReason, Refused, SequenceDelta, SubmitReply

NOT_FINITE = "the model's logits were not finite"
MAX_IN_FLIGHT = 2


class LoadFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The scheduler's part of a ReplicaLoad; the fields mean the same there."""

    last_submission: int
    blocks_total: int
    blocks_free: int
    blocks_evictable: int
    blocks_reserved: int
    num_running: int
    num_waiting: int
    prefill_backlog_tokens: int
    decode_kv_tokens: int


class Scheduler:
    """Not thread-safe. Steps are completed in the order in which they were scheduled."""

    def __init__(self, pool: BlockPool, limits: SchedulerLimits, growth: OutputGrowth | None = None) -> None:
        """`growth` foretells outputs' lengths; by default it starts from the common prior."""
        self.pool = pool
        self.limits = limits
        self._growth = growth or OutputGrowth(pool, limits.max_context_tokens)
        self._num_departures = 0  # from running: only then may who was held back find room
        self._held_back: tuple[Sequence, int] | None = None  # and the departures by then
        self._holdings = Holdings(pool)
        self._live: dict[str, Sequence] = {}
        self._waiting: list[Sequence] = []  # both sorted by Sequence.order
        self._running: list[Sequence] = []
        self._ends: dict[str, SequenceDelta] = {}  # aborted between steps, not yet told
        self._last_arrival = 0
        self._step_number = 0
        self._in_flight: deque[ScheduledStep] = deque()  # at most MAX_IN_FLIGHT

    @property
    def has_work(self) -> bool:
        """Somebody is still to be told something, or a step is to be completed."""
        return bool(self._live or self._ends or self._in_flight)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """What runs, in order of service; only to be read."""
        return tuple(self._running)

    # ---- requests in ----------------------------------------------------------------------------

    def reserve(self, sequence: Sequence, now_s: float) -> SubmitReply:
        """Accept `sequence` and queue it, or refuse it. Accepted ones finish exactly once."""
        why = self.limits.why_never(sequence.num_tokens, self.pool)
        if sequence.request_id in self._live or sequence.request_id in self._ends:
            why = "duplicate request id"
        if why is not None:
            return self._refused(sequence, why, permanent=True)
        cost, headroom = self._holdings.cost_blocks(sequence), self._headroom_blocks
        if sequence.reserve_blocks and cost > headroom:
            return self._refused(sequence, f"{cost} blocks are asked for, {headroom} are left")
        most = sequence.max_backlog_tokens
        if most is not None and (backlog := self._backlog_tokens()) > most:
            return self._refused(
                sequence, f"{backlog} prompt tokens wait, at most {most} were to", is_busy=True
            )
        self._last_arrival += 1
        sequence.arrival = self._last_arrival
        sequence.accepted_s = now_s
        sequence.most_tokens = self.limits.most_tokens(sequence, self.pool)
        self._live[sequence.request_id] = sequence
        self._holdings.open(sequence)
        insort(self._waiting, sequence, key=_order)
        return Accepted(
            request_id=sequence.request_id,
            submission=sequence.arrival,
            reserved_blocks=cost,
            matched_blocks=len(sequence.block_table),
        )

    def abort(self, request_id: str) -> bool:
        """End a request; its delta comes with the next ones. False when it is not here any more.

        What a step in flight works on ends when that step completes.
        """
        sequence = self._live.get(request_id)
        if sequence is None or sequence.is_aborted:
            return False
        if any(chunk.sequence is sequence for step in self._in_flight for chunk in step.chunks):
            sequence.is_aborted = True
        else:
            self._ends[request_id] = self._finish(sequence, "abort")
        return True

    # ---- steps out ------------------------------------------------------------------------------

    def schedule(self, now_s: float, limit: StepBudget | None = None) -> ScheduledStep | None:
        """The next step, or None when there is none before those in flight are complete. `limit` is the
        governor's.
        """
        assert len(self._in_flight) < MAX_IN_FLIGHT, "complete a step first"
        growing = self._growing()
        if self._in_flight and not self._unpin_waiting(len(growing)):
            return None
        limit = limit or StepBudget(self.limits.max_step_tokens, self.limits.max_num_seqs)
        budget = min(self.limits.max_step_tokens, limit.max_tokens)
        num_preemptions = self._grow(growing)
        chunks: list[Chunk] = []
        for sequence in self._decodes_first():
            if budget == 0:
                break
            chunks.append(Chunk.next_of(sequence, budget))
            budget -= chunks[-1].num_tokens
        hits = host_hits = queries = 0
        while budget > 0 and (admitted := self._admit_next(limit.max_running)) is not None:
            if admitted.admitted_s is None:
                admitted.admitted_s = now_s
                admitted.cached_tokens = admitted.num_computed
                hits += admitted.num_computed
                host_hits += admitted.fetched_tokens
                queries += admitted.num_tokens
            chunks.append(Chunk.next_of(admitted, budget))
            budget -= chunks[-1].num_tokens
        if not chunks:
            assert self._in_flight or not self._live, "live sequences, and no step for them"
            return None
        self._step_number += 1
        step = ScheduledStep(
            self._step_number,
            tuple(chunks),
            num_preemptions,
            hits,
            queries,
            host_hits,
            self.pool.take_copies(),
        )
        step.expect()
        self._in_flight.append(step)
        return step

    def complete(
        self, step: ScheduledStep, token_ids: NDArray[np.int32], now_s: float
    ) -> tuple[SequenceDelta, ...]:
        """Take in the tokens that the oldest step in flight drew, one a chunk that wants one, -1 for logits
        not finite.

        A stop token is part of its sequence's delta; what a later step in flight draws after it is dropped.
        Returns the news of every request that has some, those aborted meanwhile included.
        """
        assert step is self._in_flight[0]
        self._in_flight.popleft()
        drawn = iter(token_ids.tolist())
        deltas = []
        for chunk in step.chunks:
            token_id = next(drawn) if chunk.wants_token else None
            if chunk.sequence.state is SequenceState.FINISHED:
                continue
            delta = self._advance(chunk, token_id, now_s)
            if delta is not None:
                deltas.append(delta)
        return (*deltas, *self.take_ends())

    def take_ends(self) -> tuple[SequenceDelta, ...]:
        """The deltas of requests that ended between steps; each is given out once."""
        ends = tuple(self._ends.values())
        self._ends.clear()
        return ends

    def end_all(self, reason: FinishReason, why: str) -> tuple[SequenceDelta, ...]:
        """End every request, whatever is in flight: for an engine that goes on no more."""
        self._in_flight.clear()
        ended = [self._finish(sequence, reason, why) for sequence in list(self._live.values())]
        return (*self.take_ends(), *ended)

    # ---- facts ----------------------------------------------------------------------------------

    def load(self) -> LoadFigures:
        decoding = [len(s.token_ids) for s in self._running if s.is_decoding]
        return LoadFigures(
            last_submission=self._last_arrival,
            blocks_total=self.pool.num_blocks,
            blocks_free=self.pool.num_free,
            blocks_evictable=self.pool.num_evictable,
            blocks_reserved=self.pool.num_available - self._headroom_blocks,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            prefill_backlog_tokens=self._backlog_tokens(),
            decode_kv_tokens=sum(decoding),
        )

    def check_integrity(self) -> None:
        """Assert that lists, block tables, reservations and the pool tell the same story."""
        self._holdings.check_integrity(self._live.values())
        assert all(sequence.state is SequenceState.WAITING for sequence in self._waiting)
        assert all(sequence.state is SequenceState.RUNNING for sequence in self._running)
        assert {*self._waiting, *self._running} == set(self._live.values())
        assert len(self._waiting) + len(self._running) == len(self._live)
        for queue in (self._waiting, self._running):
            assert queue == sorted(queue, key=_order)
        assert len(self._running) <= self.limits.max_num_seqs

    @property
    def _headroom_blocks(self) -> int:
        """What a new request can count on: neither promised, nor foreseen for what runs."""
        promised = sum(sequence.outstanding_blocks for sequence in self._waiting)
        moment = (self._step_number // self.pool.block_tokens, self._num_departures, len(self._running))
        foreseen = promised + self._growth.growth_blocks(self._running, moment)
        return min(self._holdings.headroom_blocks, self.pool.num_available - foreseen)

    def _decodes_first(self) -> list[Sequence]:
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self._running:
            if sequence.is_ending:
                continue
            (decodes if sequence.is_decoding else prefills).append(sequence)
        return decodes + prefills

    # ---- admission ------------------------------------------------------------------------------

    def _refused(
        self, sequence: Sequence, why: str, *, permanent: bool = False, is_busy: bool = False
    ) -> Refused:
        return Refused(
            request_id=sequence.request_id,
            headroom_blocks=self._headroom_blocks,
            backlog_tokens=self._backlog_tokens(),
            why=why,
            permanent=permanent,
            is_busy=is_busy,
        )

    def _backlog_tokens(self) -> int:
        """Tokens that wait for their prefill, or are in the middle of it."""
        decoding = sum(sequence.is_decoding for sequence in self._running)
        unscheduled = sum([len(s.token_ids) - s.num_computed for s in self._live.values()]) - decoding
        return unscheduled + sum(step.prefill_tokens for step in self._in_flight)

    def _admit_next(self, max_running: int) -> Sequence | None:
        """Move the head of the line to running, with blocks for its known tokens; None if it must wait.

        What running sequences were promised is kept for them: without that, one that was just
        preempted would come back only to be preempted again.
        """
        if not self._waiting or len(self._running) >= min(max_running, self.limits.max_num_seqs):
            return None
        head = self._waiting[0]
        if self._held_back == (head, self._num_departures):
            return None
        self._holdings.hold_prefix(head)
        if self._running and not self._growth.has_room(self._running, self._waiting):
            self._held_back = (head, self._num_departures)
            return None
        promised = sum(sequence.outstanding_blocks for sequence in self._running)
        missing = self.pool.blocks_for(head.num_tokens) - len(head.block_table)
        if not self._unpin_waiting(missing + promised, keep=head):
            return None
        self._holdings.bring_prefix(head)
        self._holdings.allocate(head, self.pool.blocks_for(head.num_tokens) - len(head.block_table))
        self._waiting.pop(0)
        head.state = SequenceState.RUNNING
        insort(self._running, head, key=_order)
        return head

    # ---- blocks ---------------------------------------------------------------------------------

    def _growing(self) -> list[Sequence]:
        """The decodes whose last block is full; a prefill has blocks for all its tokens."""
        size = self.pool.block_tokens
        return [s for s in self._running if len(s.token_ids) > len(s.block_table) * size and not s.is_ending]

    def _grow(self, growing: list[Sequence]) -> int:
        """A block for each of them; returns the preemptions that took."""
        num_preemptions = 0
        for sequence in growing:
            while sequence.state is SequenceState.RUNNING and not self._unpin_waiting(1):
                self._preempt(self._choose_victim())
                num_preemptions += 1
            if sequence.state is SequenceState.RUNNING:
                self._holdings.allocate(sequence, 1)
        return num_preemptions

    def _choose_victim(self) -> Sequence:
        """Lowest priority class, then least computed work, then latest arrival.

        There always is one: who needs a block has won a token since it was admitted.
        """
        candidates = [sequence for sequence in self._running if not sequence.is_protected]
        return max(candidates, key=lambda s: (s.priority, -s.num_computed, s.arrival))

    def _preempt(self, sequence: Sequence) -> None:
        self._holdings.drop(sequence)
        _remove(self._running, sequence)
        self._num_departures += 1
        sequence.state = SequenceState.WAITING
        sequence.num_preemptions += 1
        sequence.tokens_when_preempted = sequence.num_tokens
        insort(self._waiting, sequence, key=_order)

    def _unpin_waiting(self, needed_blocks: int, keep: Sequence | None = None) -> bool:
        """Whether so many are available, if need be by releasing prefix holds of the last in line."""
        if self.pool.num_available >= needed_blocks:
            return True
        for sequence in reversed(self._waiting):
            if sequence.block_table and sequence is not keep:
                self._holdings.drop(sequence)
                if self.pool.num_available >= needed_blocks:
                    return True
        return False

    # ---- progress -------------------------------------------------------------------------------

    def _advance(self, chunk: Chunk, token_id: int | None, now_s: float) -> SequenceDelta | None:
        """A live sequence after its chunk has run; `token_id` is None where no token was wanted."""
        sequence = chunk.sequence
        if token_id is not None and token_id < 0:
            self._distrust(sequence)
            return self._finish(sequence, "error", NOT_FINITE)
        self._holdings.register_full(sequence, chunk.end)
        if sequence.is_aborted:
            return self._finish(sequence, "abort")
        if token_id is None:
            return None
        sequence.learn(token_id)
        times = sequence.times(now_s) if sequence.num_outputs == 1 else None
        reason: FinishReason | None = None
        if token_id in sequence.sampling.stop_token_ids:
            reason = "stop"
        elif sequence.num_known >= sequence.most_tokens:
            reason = "length"
        if reason is not None:
            self._finish(sequence, reason)
        return SequenceDelta(
            request_id=sequence.request_id, token_ids=(token_id,), finish_reason=reason, times=times
        )

    def _distrust(self, sequence: Sequence) -> None:
        """Its keys and values may be what went wrong: nobody shall begin with them."""
        self.pool.forget(sequence.block_table)
        for waiting in self._waiting:
            if waiting.block_table:
                self._holdings.drop(waiting)

    def _finish(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> SequenceDelta:
        sequence.forget_pending()
        self._holdings.close(sequence)
        is_waiting = sequence.state is SequenceState.WAITING
        _remove(self._waiting if is_waiting else self._running, sequence)
        self._num_departures += not is_waiting
        self._growth.observe(sequence, is_whole=reason == "stop")
        sequence.state = SequenceState.FINISHED
        del self._live[sequence.request_id]
        return SequenceDelta(
            request_id=sequence.request_id,
            finish_reason=reason,
            error=error,
        )


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.order


def _remove(queue: list[Sequence], sequence: Sequence) -> None:
    del queue[bisect_left(queue, sequence.order, key=_order)]
