"""What remains of a request when it has ended: its metrics, its trace, and one log line."""

from __future__ import annotations

import logging
import time

from serving import metrics
from serving.completions import Reply
from serving.errors import ApiError
from serving.metrics import Meter
from serving.tracing import RequestTimes, RequestTrace, Tracer

logger = logging.getLogger(__name__)

NOT_PLACED = "none"  # the region of a request that no replica took


class RequestLog:
    """One for an Ingress replica. Never told a prompt, a text or a key."""

    def __init__(self, model: str, meter: Meter, tracer: Tracer) -> None:
        self._model = model
        self._meter = meter
        self._tracer = tracer

    def begin(self, traceparent: str | None) -> RequestTrace:
        """A request is here; its trace starts now."""
        return self._tracer.begin(traceparent)

    def refused(self, error: ApiError) -> None:
        """Count a request that was answered before it could begin: a bad body, no key, no such route."""
        outcome = error.code or error.type
        self._meter.add(metrics.REQUESTS, 1, {"model": self._model, "region": NOT_PLACED, "outcome": outcome})

    def ended(self, reply: Reply, trace: RequestTrace, error: ApiError | None) -> None:
        """Count, trace and log a request, once, however it went."""
        route = reply.generation.route
        region = route.region if route is not None else NOT_PLACED
        outcome = (error.code or error.type) if error is not None else reply.finish_reason
        ended_s = time.time()
        self._count(reply, region, outcome, ended_s)
        times = reply.generation.times
        trace.finish(
            RequestTimes(
                started_s=reply.started_s,
                picked_s=times.picked_s,
                accepted_s=times.accepted_s,
                ended_s=ended_s,
                sequence=times.sequence,
            ),
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": "searoom",
                "gen_ai.request.model": self._model,
                "gen_ai.usage.input_tokens": reply.prompt_tokens,
                "gen_ai.usage.output_tokens": reply.output_tokens,
                "searoom.region": region,
                "searoom.outcome": outcome,
            },
            error=outcome if error is not None else None,
        )
        logger.info(
            "request ended",
            extra={
                "request_id": reply.request_id,
                "outcome": outcome,
                "region": region,
                "replica": route.replica_id if route is not None else None,
                "prompt_tokens": reply.prompt_tokens,
                "output_tokens": reply.output_tokens,
                "cached_tokens": reply.cached_tokens,
                "duration_ms": round((ended_s - reply.started_s) * 1000, 1),
                **_hops_ms(reply),
                "refusals": reply.generation.refusals,
            },
        )

    def _count(self, reply: Reply, region: str, outcome: str, ended_s: float) -> None:
        meter, tags = self._meter, {"model": self._model, "region": region}
        meter.add(metrics.REQUESTS, 1, tags | {"outcome": outcome})
        meter.observe(metrics.REQUEST_DURATION, ended_s - reply.started_s, tags)
        meter.add(metrics.PROMPT_TOKENS, reply.prompt_tokens, tags)
        meter.add(metrics.CACHED_TOKENS, reply.cached_tokens, tags)
        meter.add(metrics.OUTPUT_TOKENS, reply.output_tokens, tags)
        first_s = reply.generation.times.first_token_s
        if first_s:
            meter.observe(metrics.TTFT, _ttft_s(reply), tags)
            if reply.output_tokens > 1:
                per_token_s = (ended_s - first_s) / (reply.output_tokens - 1)
                meter.observe(metrics.TIME_PER_OUTPUT_TOKEN, per_token_s, tags)


def _hops_ms(reply: Reply) -> dict[str, float]:
    """Where the time to the first token went, milliseconds; empty when there was none."""
    times = reply.generation.times
    if times.sequence is None:
        return {}
    hops = {
        "ttft_ms": _ttft_s(reply) * 1000,
        "pick_ms": (times.picked_s - reply.started_s) * 1000,
        "submit_ms": (times.accepted_s - times.picked_s) * 1000,
        "queue_ms": times.sequence.queue_ms,
        "prefill_ms": times.sequence.prefill_ms,
    }
    return {name: round(value, 1) for name, value in hops.items()}


def _ttft_s(reply: Reply) -> float:
    return max(0.0, reply.generation.times.first_token_s - reply.started_s)
