"""ModelReplica: one tensor-parallel group as one Serve replica. No tensor work happens here.

    Ingress ─submit, abort─► ModelReplica ─► rank 0 ─frames─► split by Ingress ─frames─► Ingress
                                   └─ReplicaReport─► Router

A request belongs to the Ingress that submitted it: when that one's stream ends, its requests are
aborted. When a rank dies, the replica ends its streams with an error event and exits, so that
Serve replaces the whole group at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator

from ray.exceptions import RayError

from cluster.load import ReplicaLoad
from serving import metrics
from serving.background import Background
from serving.direct_calls import DirectService, Door, ray_tls
from serving.errors import ReplicaGone
from serving.gpu_watch import watch_gpus
from serving.load_reporter import LoadReporter
from serving.logs import configure as configure_logs
from serving.messages import (
    Accepted,
    SequenceDelta,
    StepFrame,
    StepStats,
    Submit,
    SubmitReply,
    decode,
    encode,
)
from serving.rank_group import RankGroup, ReplicaSetup
from serving.ray_compat import RayMeter, ServiceHandle, application_name, node_address, replica_id
from serving.transport import DelayLine, Outbox

logger = logging.getLogger(__name__)

FLUSH_S = 0.3  # for the error events of a dying replica to leave it
HANG_FLOOR_S = 60.0  # a first step may compile, or read weights in
HANG_FACTOR = 20  # a step this many times longer than the fullest one's prediction is a hang


class ModelReplica:
    """Made by Serve, in bundle 0 of its placement group."""

    async def __init__(self, setup: ReplicaSetup) -> None:  # type: ignore[misc]  # Serve awaits it
        self._id = replica_id()
        configure_logs(setup.log_level, replica=self._id, region=setup.region)
        self._tags = {"region": setup.region, "replica": self._id}
        self._meter = RayMeter(metrics.REPLICA_SERIES)
        self._owners: dict[str, str] = {}  # request id → ingress id
        self._outbox: Outbox[StepFrame] = Outbox()
        self._failure: str | None = None
        self._exiting: asyncio.Task[None] | None = None
        self._background = Background()
        self._load: ReplicaLoad | None = None
        self._last_frame_s = time.monotonic()
        self._next_step_ms = 0.0
        self._group = await RankGroup.start(setup, self._id, self._fail)
        tls = ray_tls()
        self._door = await Door.open(self, ("submit", "abort"), node_address(), tls)
        router = DirectService(ServiceHandle("Router", application_name()), "Router", tls)
        load = decode(await self._group.load_report(), ReplicaLoad)
        line = DelayLine(setup.pretend_rtt_ms)
        self._reporter = LoadReporter(load, router, line, self._group.block_snapshot)
        self._background.start(self._reporter.run(), "report")
        self._background.start(self._pump(), "pump")
        self._background.start(self._watch_for_hang(), "watch")
        gpus = watch_gpus(RayMeter(metrics.GPU_SERIES), setup.region, node_address())
        self._background.start(gpus, "gpus")
        logger.info("replica ready", extra={"blocks": self._group.ready[0].num_blocks})

    async def door(self) -> bytes:
        """Where `submit` and `abort` are called: an encoded `direct_calls.Address`."""
        return self._door.address

    async def submit(self, ingress_id: str, payload: bytes) -> bytes:
        """Reserve and queue a list of Submit; a list of Accepted or Refused comes back, in order."""
        submits = decode(payload, list[Submit])
        if self._failure is not None or not self._outbox.is_attached(ingress_id):
            raise ReplicaGone(self._id)
        # An Ingress that dies meanwhile cancels this call, but not what rank 0 is asked already.
        return encode(await asyncio.shield(self._submit(ingress_id, submits)))

    async def _submit(self, ingress_id: str, submits: list[Submit]) -> list[SubmitReply]:
        fresh = [submit.request_id for submit in submits if submit.request_id not in self._owners]
        # Before the engine knows of them, so that their first frame finds its owner.
        self._owners.update(dict.fromkeys(fresh, ingress_id))
        accepted: set[str] = set()
        try:
            replies = await self._group.submit(submits)
            accepted = {reply.request_id for reply in replies if isinstance(reply, Accepted)}
            self._meter.add(metrics.REFUSALS, len(replies) - len(accepted), self._tags)
        finally:
            for request_id in set(fresh) - accepted:
                self._owners.pop(request_id, None)
        if not self._outbox.is_attached(ingress_id):
            await self._abandon(ingress_id)
        return replies

    async def abort(self, request_ids: list[str]) -> None:
        """End these requests and release their blocks; unknown ids are ignored."""
        await self._group.abort(request_ids)

    async def frames(self, ingress_id: str) -> AsyncIterator[bytes]:
        """This Ingress's part of every step, until one of the two is gone.

        The first item is empty: it says that the stream is attached. What was submitted before
        that is aborted, because an Ingress that attaches again has given it up.
        """
        await self._abandon(ingress_id)
        try:
            async for batch in self._outbox.consume(ingress_id):
                yield encode(batch)
        finally:
            if not self._outbox.is_attached(ingress_id):
                await self._abandon(ingress_id)

    async def _abandon(self, ingress_id: str) -> None:
        """Abort all that this Ingress has here; nobody is left to hear how it ends."""
        orphans = [request for request, owner in self._owners.items() if owner == ingress_id]
        for request_id in orphans:
            del self._owners[request_id]
        if orphans and self._failure is None:
            logger.info("ingress is gone", extra={"aborted": len(orphans)})
            await self._group.abort(orphans)

    async def check_health(self) -> None:
        """Answers from memory, never through the engine: a long step is not a failure."""
        self._background.check()
        if self._failure is not None:
            raise RuntimeError(self._failure)

    async def pids(self) -> list[int]:
        """Process ids of this replica and its ranks, for `status` and for tests of deaths."""
        return [os.getpid(), *(rank.pid for rank in self._group.ready)]

    async def _pump(self) -> None:
        """Carry rank 0's frames to those who wait for them."""
        try:
            async for frames in self._group.frames():
                self._last_frame_s = time.monotonic()
                for frame in frames:
                    self._deliver(frame)
            self._fail("rank 0 ended")
        except RayError as died:
            logger.error("rank 0 failed: %s", type(died).__name__)
            self._fail("rank 0 died")

    def _deliver(self, frame: StepFrame) -> None:
        self._next_step_ms = frame.next_step_ms
        parts: dict[str, list[SequenceDelta]] = {}
        for delta in frame.deltas:
            finished = delta.finish_reason is not None
            owner = (
                self._owners.pop(delta.request_id, None) if finished else self._owners.get(delta.request_id)
            )
            if owner is not None:
                parts.setdefault(owner, []).append(delta)
        for owner, deltas in parts.items():
            self._outbox.put(owner, StepFrame(step=frame.step, deltas=tuple(deltas)))
        if frame.block_events is not None:
            self._reporter.blocks_changed(frame.block_events)
        if frame.load is not None:
            self._load = frame.load
            self._reporter.changed(frame.load)
            self._record_load(frame.load)
        if frame.stats is not None:
            self._record_step(frame.stats)

    def _fail(self, why: str) -> None:
        """A rank is gone: tell every request, then leave, so that Serve starts a new group."""
        if self._failure is not None:
            return
        self._failure = why
        logger.error("replica ends: %s", why)
        for request_id, owner in self._owners.items():
            delta = SequenceDelta(request_id=request_id, finish_reason="lost", error=why)
            self._outbox.put(owner, StepFrame(step=-1, deltas=(delta,)))
        self._outbox.close_all()
        self._exiting = asyncio.create_task(self._exit())

    async def _exit(self) -> None:
        await asyncio.sleep(FLUSH_S)
        self._group.close()
        os._exit(1)

    async def _watch_for_hang(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            allowed_s = max(HANG_FLOOR_S, HANG_FACTOR * self._next_step_ms / 1000)
            if self._is_idle:
                self._last_frame_s = time.monotonic()
            elif time.monotonic() - self._last_frame_s > allowed_s:
                self._fail(f"no step within {allowed_s:.0f} s")

    @property
    def _is_idle(self) -> bool:
        """Nothing is accepted that has not ended, as far as the replica and the last frame know."""
        load = self._load
        return not self._owners and (load is None or load.num_running + load.num_waiting == 0)

    def _record_load(self, load: ReplicaLoad) -> None:
        cached = load.blocks_evictable
        self._meter.set(metrics.ASLEEP, float(load.asleep), self._tags)
        self._meter.set(metrics.KV_BLOCKS_FREE, load.blocks_free, self._tags)
        self._meter.set(metrics.KV_BLOCKS_EVICTABLE, cached, self._tags)
        self._meter.set(metrics.KV_BLOCKS_RESERVED, load.blocks_reserved, self._tags)
        self._meter.set(metrics.KV_BLOCKS_USED, load.blocks_total - load.blocks_free - cached, self._tags)

    def _record_step(self, stats: StepStats) -> None:
        meter, tags = self._meter, self._tags
        meter.observe(metrics.STEP_TIME, stats.step_ms / 1000, tags)
        meter.observe(metrics.STEP_TIME_PREDICTED, stats.predicted_ms / 1000, tags)
        meter.observe(metrics.BATCH_SIZE, stats.batch_size, tags)
        meter.add(metrics.FLOPS, stats.flops, tags)
        meter.add(metrics.BYTES_MOVED, stats.bytes_moved, tags)
        meter.set(metrics.ARITHMETIC_INTENSITY, stats.flops / max(stats.bytes_moved, 1.0), tags)
        meter.set(metrics.RIDGE_POINT, stats.ridge_flop_per_byte, tags)
        meter.set(metrics.COMPUTE_BOUND, float(stats.bound == "compute"), tags)
        meter.set(metrics.ROOFLINE_RATIO, stats.floor_ms / stats.step_ms if stats.step_ms else 0.0, tags)
        meter.add(metrics.PREEMPTIONS, stats.num_preemptions, tags)
        meter.add(metrics.PREFIX_HIT_TOKENS, stats.prefix_hit_tokens, tags)
        meter.add(metrics.HOST_HIT_TOKENS, stats.host_hit_tokens, tags)
        meter.add(metrics.PREFIX_QUERY_TOKENS, stats.prefix_query_tokens, tags)
