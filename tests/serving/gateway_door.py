"""A gateway with a replica in memory behind it, and requests driven as a server drives them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from serving import metrics
from serving.auth import KeyRing, digest_of
from serving.dispatcher import DispatcherLimits
from serving.gateway import Gateway, GatewayLimits
from serving.messages import SequenceDelta, Submit
from serving.metrics import MemoryMeter
from serving.model_files import ModelFiles
from serving.model_spec import read_model_spec
from serving.request_log import RequestLog
from serving.tokenizer import Tokenizer
from serving.tracing import NoTracer
from tests.serving.fleet_fakes import PATIENT, FakeFleet, FakeReplica

KEY, OTHER_KEY = "sk-test", "sk-other"
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
TEXT = "The capital is Paris."
CHAT = "/v1/chat/completions"
ASKED = {"model": "m", "messages": [{"role": "user", "content": "Capital?"}], "max_tokens": 16}
MAX_BODY_BYTES = 4096


class Door:
    """A gateway before one replica, and what lies behind it for a test to turn."""

    def __init__(self, files: ModelFiles, tokenizer: Tokenizer, fleet: FakeFleet, timeout_s: float) -> None:
        spec = read_model_spec(files.folder)
        self.fleet = fleet
        self.replica = fleet.replicas.all["a"]
        self.answer = tokenizer.encode(TEXT, add_special=False)
        self.meter = MemoryMeter()
        self.is_ready = True
        self.status_error: Exception | None = None
        self.app = Gateway(
            "m",
            tokenizer,
            spec,
            KeyRing((digest_of(KEY), digest_of(OTHER_KEY))),
            fleet.completions(timeout_s),
            GatewayLimits(MAX_BODY_BYTES, spec.context_tokens),
            RequestLog("m", self.meter, NoTracer()),
            is_ready=lambda: self.is_ready,
            fleet_status=self._status,
        )
        self.http = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app), base_url="http://door", headers=HEADERS
        )

    async def _status(self) -> bytes:
        if self.status_error is not None:
            raise self.status_error
        return b"{}"

    def answer_all(self) -> None:
        """The replica answers every request with TEXT, a token a step."""
        self.replica.script = self._script

    def requests(self, outcome: str, region: str = "us-east") -> float:
        return self.meter.value(metrics.REQUESTS, model="m", region=region, outcome=outcome)

    def _script(self, submit: Submit) -> list[SequenceDelta]:
        request_id = submit.request_id
        tokens = [SequenceDelta(request_id=request_id, token_ids=(token,)) for token in self.answer]
        return [*tokens, SequenceDelta(request_id=request_id, finish_reason="stop")]


@asynccontextmanager
async def open_door(
    files: ModelFiles, tokenizer: Tokenizer, *, timeout_s: float = 5.0, limits: DispatcherLimits = PATIENT
) -> AsyncIterator[Door]:
    async with FakeFleet(FakeReplica("a", blocks=20), limits=limits) as fleet:
        door = Door(files, tokenizer, fleet, timeout_s)
        async with door.http:
            yield door


class Exchange:
    """One request driven as a server does, so that a test sees events as they come, and may leave."""

    def __init__(self, app: Gateway, path: str, body: dict) -> None:
        self.sent: list[dict] = []
        self.is_client_gone = False
        headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
        }
        self._body: list[dict] = [{"type": "http.request", "body": json.dumps(body).encode()}]
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def chunks(self) -> list[dict]:
        """What was sent as events so far, without the last [DONE]."""
        body = b"".join(message.get("body", b"") for message in self.sent)
        lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
        return [json.loads(line) for line in lines if line != "[DONE]"]

    @property
    def text(self) -> str:
        deltas = [chunk["choices"][0]["delta"] for chunk in self.chunks if chunk.get("choices")]
        return "".join(delta.get("content") or "" for delta in deltas)

    async def _receive(self) -> dict:
        return self._body.pop() if self._body else {"type": "http.disconnect"}

    async def _send(self, message: dict) -> None:
        if self.is_client_gone:
            raise OSError("the connection is closed")
        self.sent.append(message)
