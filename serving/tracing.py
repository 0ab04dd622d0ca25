"""One trace a request, in OpenTelemetry: what took its time between the door and the last token.

    ingress ────────────────────────────────────────────────   arrival → end
      pick ────────                                             arrival → a replica was picked
                   queue ────                                   accepted → first prefill chunk
                             prefill ─────                      → first token
                                          decode ───────────    → end

The stages are known when the request ends, and are written then, with the times they had. No
prompt, text or key goes into a span. Baggage that comes in is ignored, and a caller's wish to be
sampled is granted only within our own ratio: the edge is public.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    ConsoleSpanExporter,
    SpanExporter,
)
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serving.messages import SequenceTimes

FLUSH_MS = 500  # how long a finished span may wait for others before it is sent
_PROPAGATOR = TraceContextTextMapPropagator()

Attributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, kw_only=True)
class RequestTimes:
    """Unix seconds of what happened to a request at Ingress; 0 for what did not happen.

    `sequence` is the replica's account of its own part, in ms since it accepted the request.
    """

    started_s: float
    picked_s: float = 0.0
    accepted_s: float = 0.0
    ended_s: float
    sequence: SequenceTimes | None = None


@dataclass(frozen=True)
class Stage:
    name: str
    start_s: float
    end_s: float


def stages(times: RequestTimes) -> list[Stage]:
    """The stages a request went through. Each lies within [started_s, ended_s], whatever the clocks said."""
    found = []
    if times.picked_s:
        found.append(Stage("pick", times.started_s, times.picked_s))
    if times.accepted_s and times.sequence is not None:
        scheduled_s = times.accepted_s + times.sequence.queue_ms / 1000
        first_token_s = scheduled_s + times.sequence.prefill_ms / 1000
        found.append(Stage("queue", times.accepted_s, scheduled_s))
        found.append(Stage("prefill", scheduled_s, first_token_s))
        found.append(Stage("decode", first_token_s, times.ended_s))
    elif times.accepted_s:
        found.append(Stage("queue", times.accepted_s, times.ended_s))

    def within(time_s: float) -> float:
        return min(max(time_s, times.started_s), times.ended_s)

    return [Stage(stage.name, within(stage.start_s), within(stage.end_s)) for stage in found]


class RequestTrace(Protocol):
    """The trace of one request under way."""

    @property
    def traceparent(self) -> str | None:
        """What to send on, W3C Trace Context; None when nothing is traced."""

    def finish(self, times: RequestTimes, attributes: Attributes, error: str | None = None) -> None:
        """Write the request's spans. `error` is an error's code, never its text. Call it once."""


class Tracer(Protocol):
    def begin(self, traceparent: str | None) -> RequestTrace:
        """A request arrived, within the caller's trace if it sent a valid `traceparent`."""

    def close(self) -> None:
        """Send what is still buffered."""


def make_tracer(exporter: str, endpoint: str | None, sample_ratio: float, service_name: str) -> Tracer:
    """A Tracer for `exporter`: "none", "console" (standard output) or "otlp" (HTTP, protobuf).

    `endpoint` is the full URL, e.g. http://127.0.0.1:4318/v1/traces; None takes OpenTelemetry's own
    default and environment. Raises ValueError for any other exporter.
    """
    if exporter == "none":
        return NoTracer()
    if exporter == "console":
        return SpanTracer(ConsoleSpanExporter(), sample_ratio, service_name)
    if exporter == "otlp":
        return SpanTracer(OTLPSpanExporter(endpoint=endpoint), sample_ratio, service_name)
    raise ValueError(f'exporter: {exporter!r} is not one of "none", "console", "otlp"')


class NoTracer:
    """Tracing is off: no span, no thread, no context sent on."""

    traceparent: str | None = None

    def begin(self, traceparent: str | None) -> NoTracer:
        return self

    def finish(self, times: RequestTimes, attributes: Attributes, error: str | None = None) -> None:
        pass

    def close(self) -> None:
        pass


class SpanTracer:
    """Traces with the OpenTelemetry SDK, in a provider of its own: the global one stays untouched."""

    def __init__(self, exporter: SpanExporter, sample_ratio: float, service_name: str) -> None:
        ours = TraceIdRatioBased(sample_ratio)
        self._provider = TracerProvider(
            sampler=ParentBased(root=ours, remote_parent_sampled=ours),
            resource=Resource.create({"service.name": service_name}),
            shutdown_on_exit=True,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=FLUSH_MS))
        self._tracer = self._provider.get_tracer("searoom")

    def begin(self, traceparent: str | None) -> SpanTrace:
        caller = _PROPAGATOR.extract({"traceparent": traceparent}, Context()) if traceparent else Context()
        return SpanTrace(self, self._tracer.start_span("ingress", caller, SpanKind.SERVER))

    def stage(self, parent: Span, stage: Stage) -> None:
        context = set_span_in_context(parent, Context())
        span = self._tracer.start_span(stage.name, context, start_time=_nanoseconds(stage.start_s))
        span.end(_nanoseconds(stage.end_s))

    def close(self) -> None:
        self._provider.shutdown()


class SpanTrace:
    """One request's spans."""

    def __init__(self, tracer: SpanTracer, root: Span) -> None:
        self._tracer = tracer
        self._root = root

    @property
    def traceparent(self) -> str | None:
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(self._root, Context()))
        return carrier.get("traceparent")

    def finish(self, times: RequestTimes, attributes: Attributes, error: str | None = None) -> None:
        if not self._root.is_recording():
            return
        for stage in stages(times):
            self._tracer.stage(self._root, stage)
        self._root.set_attributes(dict(attributes))
        if error is not None:
            self._root.set_attribute("error.type", error)
            self._root.set_status(Status(StatusCode.ERROR))
        self._root.end(_nanoseconds(times.ended_s))


def _nanoseconds(unix_s: float) -> int:
    return round(unix_s * 1e9)
