"""Traces: what a span says, what it must not say, and that spans arrive at a real receiver."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from serving.messages import SequenceTimes
from serving.tracing import RequestTimes, SpanTracer, make_tracer, stages

CALLER_TRACE, CALLER_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"
NOT_SAMPLED = f"00-{CALLER_TRACE}-{CALLER_SPAN}-00"
SEQUENCE = SequenceTimes(queue_ms=100.0, prefill_ms=250.0, cached_tokens=0)


def _times(started_s: float) -> RequestTimes:
    return RequestTimes(
        started_s=started_s,
        picked_s=started_s + 0.01,
        accepted_s=started_s + 0.02,
        ended_s=started_s + 1.0,
        sequence=SEQUENCE,
    )


def _traced(traceparent: str | None, ratio: float = 1.0) -> tuple[str | None, dict[str, Any]]:
    """The traceparent sent on, and the spans of one request by name."""
    exporter = InMemorySpanExporter()
    tracer = SpanTracer(exporter, ratio, "searoom-ingress")
    trace = tracer.begin(traceparent)
    sent_on = trace.traceparent
    trace.finish(_times(time.time()), {"gen_ai.request.model": "smol"})
    tracer.close()
    return sent_on, {span.name: span for span in exporter.get_finished_spans()}


def test_a_request_is_one_trace_of_five_spans_with_the_times_they_had() -> None:
    """queue, prefill and decode follow each other from the replica's acceptance, to the millisecond."""
    sent_on, spans = _traced(None)
    assert set(spans) == {"ingress", "pick", "queue", "prefill", "decode"}
    root = spans["ingress"]
    assert root.parent is None
    for name in ("pick", "queue", "prefill", "decode"):
        assert spans[name].parent.span_id == root.context.span_id
        assert spans[name].context.trace_id == root.context.trace_id
    started_ns = spans["pick"].start_time
    milliseconds = {
        name: (round((span.start_time - started_ns) / 1e6), round((span.end_time - started_ns) / 1e6))
        for name, span in spans.items()
        if name != "ingress"
    }
    assert milliseconds == {"pick": (0, 10), "queue": (20, 120), "prefill": (120, 370), "decode": (370, 1000)}
    assert root.end_time == spans["decode"].end_time
    assert root.resource.attributes["service.name"] == "searoom-ingress"
    assert root.attributes["gen_ai.request.model"] == "smol"
    assert sent_on is not None
    assert sent_on.startswith(f"00-{root.context.trace_id:032x}-{root.context.span_id:016x}-")
    assert int(sent_on[-2:], 16) & 1  # sampled; the other bit says that the id is random


def test_a_callers_trace_is_continued() -> None:
    """The inbound traceparent's ids are our root's parent, and our own span's id is what goes on."""
    sent_on, spans = _traced(SAMPLED)
    root = spans["ingress"]
    assert f"{root.context.trace_id:032x}" == CALLER_TRACE
    assert f"{root.parent.span_id:016x}" == CALLER_SPAN
    assert sent_on == f"00-{CALLER_TRACE}-{root.context.span_id:016x}-01"


@pytest.mark.parametrize("broken", ["", "junk", "00-0-0-01", f"ff-{CALLER_TRACE}-{CALLER_SPAN}-01"])
def test_a_broken_traceparent_starts_a_trace_of_its_own(broken: str) -> None:
    """What a client sends there never fails a request."""
    _, spans = _traced(broken)
    assert spans["ingress"].parent is None


def test_a_caller_cannot_force_sampling_but_can_decline_it() -> None:
    """The edge is public: our ratio caps an inbound `sampled`; an inbound refusal is respected."""
    sent_on, spans = _traced(SAMPLED, ratio=0.0)
    assert spans == {} and sent_on is not None and not int(sent_on[-2:], 16) & 1
    sent_on, spans = _traced(NOT_SAMPLED, ratio=1.0)
    assert spans == {} and sent_on is not None and not int(sent_on[-2:], 16) & 1


def test_an_error_is_its_code() -> None:
    """A failed request's root has the code as `error.type`, and no text."""
    exporter = InMemorySpanExporter()
    tracer = SpanTracer(exporter, 1.0, "searoom-ingress")
    tracer.begin(None).finish(RequestTimes(started_s=1.0, ended_s=2.0), {}, error="server_is_overloaded")
    tracer.close()
    (root,) = exporter.get_finished_spans()
    assert root.status.status_code is StatusCode.ERROR and root.status.description is None
    assert dict(root.attributes or {})["error.type"] == "server_is_overloaded"


times_ms = st.none() | st.floats(-1000, 5000, allow_nan=False)


@settings(max_examples=100, deadline=None)
@given(picked=times_ms, accepted=times_ms, queue_ms=st.floats(0, 5000), prefill_ms=st.floats(0, 5000))
def test_stages_never_leave_the_request_nor_run_backwards(
    picked: float | None, accepted: float | None, queue_ms: float, prefill_ms: float
) -> None:
    """Clocks of two machines differ: whatever they said, each stage lies within the request."""
    started_s, ended_s = 1000.0, 1002.0
    found = stages(
        RequestTimes(
            started_s=started_s,
            picked_s=0.0 if picked is None else started_s + picked / 1000,
            accepted_s=0.0 if accepted is None else started_s + accepted / 1000,
            ended_s=ended_s,
            sequence=SequenceTimes(queue_ms=queue_ms, prefill_ms=prefill_ms, cached_tokens=0),
        )
    )
    assert [stage.name for stage in found] == ["pick"] * (picked is not None) + [
        "queue",
        "prefill",
        "decode",
    ] * (accepted is not None)
    for stage in found:
        assert started_s <= stage.start_s <= stage.end_s <= ended_s
    for earlier, later in zip(found[-3:], found[-2:], strict=False):
        assert accepted is None or earlier.end_s == later.start_s


def test_a_request_that_ended_in_the_queue_was_in_the_queue() -> None:
    """Accepted and aborted before its first token: one stage after the pick, until the end."""
    found = stages(RequestTimes(started_s=1.0, picked_s=1.5, accepted_s=2.0, ended_s=4.0))
    assert [(stage.name, stage.start_s, stage.end_s) for stage in found] == [
        ("pick", 1, 1.5),
        ("queue", 2, 4),
    ]


def test_off_is_off() -> None:
    """No thread, no context sent on, nothing kept; an unknown exporter is refused."""
    threads = threading.active_count()
    tracer = make_tracer("none", None, 1.0, "searoom-ingress")
    trace = tracer.begin(SAMPLED)
    assert trace.traceparent is None and trace is tracer.begin(None)
    trace.finish(_times(1.0), {})
    tracer.close()
    assert threading.active_count() == threads
    with pytest.raises(ValueError, match="jaeger"):
        make_tracer("jaeger", None, 1.0, "searoom-ingress")


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """An OTLP receiver over HTTP: its URL, and what it got."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["content-type"] == "application/x-protobuf"
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1/traces", received
    server.shutdown()
    thread.join()
    server.server_close()


def test_spans_arrive_at_an_otlp_receiver(receiver: tuple[str, list[ExportTraceServiceRequest]]) -> None:
    """Real protobuf over real HTTP, within a second of the request's end, with nobody calling flush."""
    url, received = receiver
    tracer = make_tracer("otlp", url, 1.0, "searoom-ingress")
    tracer.begin(SAMPLED).finish(_times(time.time()), {"searoom.outcome": "stop"})
    deadline = time.monotonic() + 5.0
    while not received and time.monotonic() < deadline:
        time.sleep(0.02)
    tracer.close()
    (resource_spans,) = received[0].resource_spans
    resource = {item.key: item.value.string_value for item in resource_spans.resource.attributes}
    assert resource["service.name"] == "searoom-ingress"
    spans = {span.name: span for span in resource_spans.scope_spans[0].spans}
    assert set(spans) == {"ingress", "pick", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in spans.values()} == {CALLER_TRACE}
    assert spans["prefill"].end_time_unix_nano - spans["prefill"].start_time_unix_nano == pytest.approx(
        250e6, abs=1e3
    )
