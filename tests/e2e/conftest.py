"""The clusters the end-to-end tests share; one at a time, because a laptop has few cores."""

import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from clusters import FLEET_BLOCKS, FLEET_DEADLINE_S, FLEET_REPLICAS, start, stop


@pytest.fixture(scope="module")
def otlp():
    """An OTLP/HTTP receiver; its `bodies` are what has been exported."""
    bodies: list[bytes] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.bodies = bodies
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def one_region(tmp_path_factory, otlp):
    """The embedded default: one region, one replica; a pool small enough to be filled; traced."""
    folder = tmp_path_factory.mktemp("one")
    config = folder / "config.yaml"
    url = f"http://127.0.0.1:{otlp.server_port}/v1/traces"
    config.write_text(f"tracing: {{exporter: otlp, endpoint: '{url}'}}")
    up = start(folder, "--kv-blocks", "160", "--config", str(config))
    yield up
    assert stop(up) == [], "processes are left after Ctrl-C"


@pytest.fixture(scope="module")
def two_regions(tmp_path_factory):
    """Two pretend regions with a replica each."""
    up = start(tmp_path_factory.mktemp("two"), "--regions", "us-east,eu-west", "--kv-blocks", "200")
    yield up
    assert stop(up, signal.SIGTERM) == [], "processes are left after SIGTERM"


@pytest.fixture(scope="module")
def mock_fleet(tmp_path_factory):
    """One region of four replicas with mock engines, whose steps are slow enough for streams to last."""
    folder = tmp_path_factory.mktemp("fleet")
    config = folder / "config.yaml"
    config.write_text(f"ingress: {{request_timeout_s: {FLEET_DEADLINE_S}}}")
    flags = ("--mock-engine", "--mock-step-ms", "40", "--kv-blocks", str(FLEET_BLOCKS))
    up = start(folder, *flags, "--replicas-per-region", str(FLEET_REPLICAS), "--config", str(config))
    yield up
    assert stop(up) == [], "processes are left after Ctrl-C"
