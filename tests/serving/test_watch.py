"""`searoom status --watch`: a region's figures, and when it ends."""

import http.server
import io
import itertools
import threading
from contextlib import contextmanager

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.load import ReplicaLoad, StepCoefficients
from serving import running, watch
from serving.cli import app
from serving.dispatcher import RouterStatus
from serving.errors import ConfigError, SearoomError
from serving.fleet import ReplicaStatus
from serving.region_records import RegionStatus


def replica(name, region, *, free, evictable, reserved, dispatched=0, state="fresh"):
    load = ReplicaLoad(
        replica_id=name, model="m", region=region, epoch=1, sequence=1, last_submission=0,
        blocks_total=100, blocks_free=free, blocks_evictable=evictable, blocks_reserved=reserved,
        num_running=3, num_waiting=1, prefill_backlog_tokens=50, decode_kv_tokens=0,
        step=StepCoefficients(1.0, 1.0, 0.0), max_step_tokens=64, max_num_seqs=64, num_observations=0,
    )  # fmt: skip
    return ReplicaStatus(
        load=load, state=state, age_s=0.1, rtt_ms=7.0, num_in_flight=4, dispatched_blocks=dispatched
    )


STATUS = RouterStatus(
    replicas=(
        replica("a", "eu", free=50, evictable=30, reserved=20, dispatched=5),
        replica("b", "eu", free=10, evictable=0, reserved=25, state="doubted"),
        replica("c", "us", free=100, evictable=0, reserved=0),
    ),
    unreported=("d",),
    waiting={"m": 6},
    regions={
        "eu": RegionStatus(num_accepted=70, ttft_p50_ms=123.4, is_home=True),
        "us": RegionStatus(num_accepted=30, ttft_p50_ms=None, is_home=False),
    },
)


def test_a_regions_figures_are_the_sums_of_its_replicas():
    """Headroom is free + evictable - reserved - dispatched; what is cached without a reader is not used."""
    eu, us = watch.regions_of(STATUS)
    assert (eu.headroom_blocks, us.headroom_blocks) == (50 + 30 - 20 - 5 + 10 - 25, 100)
    assert eu.kv_utilisation == (20 + 90) / 200 and us.kv_utilisation == 0


def test_what_ran_away_from_home_has_spilled():
    """Of 100 requests 30 ran in another region than the Router's; a region without answers has no TTFT."""
    eu, us = watch.regions_of(STATUS)
    assert (eu.num_spilled, us.num_spilled) == (0, 30)
    assert (eu.ttft, us.ttft) == ("123", "-")


def rows(text):
    return [line.split() for line in text.splitlines()]


def test_the_picture_shows_each_region_and_the_queue():
    """A row a region; doubted replicas are told apart, and so is one that never reported."""
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(watch.picture(STATUS))
    text = console.export_text()
    assert rows(text)[1][:5] == ["eu", "1", "of", "2", "7"]
    assert rows(text)[1][5:9] == ["40", "55", "6", "2"]
    assert "m: 6 requests queue in the Router" in text and "d: not heard of yet" in text


@contextmanager
def endpoint(*answers):
    """Serves /status with these (code, body) in turn, the last for ever."""
    left = iter(itertools.chain(answers, itertools.repeat(answers[-1])))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            code, body = next(left)
            self.send_response(code)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def watched(url, num_frames, monkeypatch):
    """What is printed while the cluster lives for so many frames."""
    monkeypatch.setattr(watch, "PERIOD_S", 0.01)
    left = iter(range(num_frames))
    console = Console(width=140, file=io.StringIO(), record=True)
    watch.watch(url, "sk-1", lambda: next(left, None) is not None, console)
    return console.export_text()


def test_it_follows_the_cluster_until_it_is_down(monkeypatch):
    """Every frame has the news of its time."""
    grown = msgspec.structs.replace(STATUS, waiting={"m": 9})
    with endpoint((200, msgspec.json.encode(STATUS)), (200, msgspec.json.encode(grown))) as url:
        text = watched(url, 2, monkeypatch)
    assert text.index("m: 6 requests") < text.index("m: 9 requests") < text.index("the cluster is down")


def test_a_failing_status_is_shown_and_does_not_end_it(monkeypatch):
    """The proxy may restart, or the Router be replaced, while somebody watches."""
    body = b'{"error": {"message": "no replica can serve yet"}}'
    encoded = msgspec.json.encode(STATUS)
    with endpoint((200, encoded), (503, body), (200, encoded)) as url:
        text = watched(url, 3, monkeypatch)
    assert "no replica can serve yet" in text
    assert text.count("m: 6 requests") == 2


def test_an_endpoint_that_refuses_at_once_is_the_usual_error(monkeypatch):
    """As without --watch: its own words, or the status where they are not Searoom's."""
    unknown = b'{"error": {"message": "this API key is not known here"}}'
    with endpoint((401, unknown)) as url, pytest.raises(SearoomError, match="not known here"):
        watched(url, 1, monkeypatch)
    with endpoint((500, b"oops")) as url, pytest.raises(SearoomError, match="answered 500"):
        watched(url, 1, monkeypatch)


def test_ctrl_c_ends_it_without_an_error(monkeypatch):
    """It is how one stops watching."""

    def interrupted():
        raise KeyboardInterrupt

    with endpoint((200, msgspec.json.encode(STATUS))) as url:
        watch.watch(url, "sk-1", interrupted, Console(file=io.StringIO()))


def test_without_a_cluster_it_says_how_to_start_one(monkeypatch):
    """The error of every command that needs one."""
    monkeypatch.setattr(running, "find", lambda: None)
    result = CliRunner().invoke(app, ["status", "--watch"])
    assert isinstance(result.exception, ConfigError) and "searoom up" in str(result.exception)
