"""Sends one chat completion and notes what comes of it, as a client sees it.

aiohttp, because its cost a streamed token is a quarter of httpx's (33 against 130 µs of CPU at 32
streams), and this program often shares its cores with the server.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import aiohttp
import orjson

from serving.bench.load.events import DONE, BadEvent, EventLines, Piece, error_of, read_piece
from serving.bench.load.record import Record, State
from serving.errors import SearoomError

CONNECT_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 2.0  # shorter than servers' 5 s, so that no request meets a connection just closed
REGION_HEADER, REPLICA_HEADER = "x-searoom-region", "x-searoom-replica"
_MAX_ERROR_BYTES = 65536

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Target:
    """Where requests go, and what is the same in all of them."""

    endpoint: str  # without /v1
    api_key: str | None
    model: str
    ignore_eos: bool = True  # every answer is as long as asked; not every server knows this field
    retries: int = 0  # of a refusal, after as long as it says
    timeout_s: float = 600.0  # from sending to the answer's end, retries included


class _Failed(Exception):
    def __init__(self, state: State, kind: str, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.state, self.kind, self.message = state, kind, message
        self.retry_after_s = retry_after_s


class Client:
    """An open connection pool without a limit: no request waits here for another's answer."""

    def __init__(self, target: Target, now_s: Callable[[], float], on_text: Callable[[], None]) -> None:
        """`now_s` is the run's clock; `on_text` hears of every piece of text."""
        self._target = target
        self._now_s = now_s
        self._on_text = on_text
        self._url = f"{target.endpoint}/v1/chat/completions"
        self._body = {
            "model": target.model,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        } | ({"ignore_eos": True} if target.ignore_eos else {})

    async def __aenter__(self) -> Client:
        self._http = _session(self._target.api_key)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.close()

    async def ask(self, record: Record, messages: Messages, max_tokens: int) -> str:
        """Fill `record`; returns the answer's text. Failures are noted there, none is raised."""
        body = orjson.dumps(self._body | {"messages": messages, "max_tokens": max_tokens})
        record.sent_s = self._now_s()
        pieces: list[str] = []
        try:
            async with asyncio.timeout(self._target.timeout_s):
                await self._with_retries(record, body, pieces)
            record.state = "ok"
        except _Failed as failed:
            record.state, record.kind, record.message = failed.state, failed.kind, failed.message
        except TimeoutError as error:
            record.state, record.kind = "failed", _timeout_kind(record, error)
            record.message = f"no end within {self._target.timeout_s:g} s"
        except aiohttp.ClientConnectorError as error:
            record.state, record.kind, record.message = "failed", "no connection", str(error)
        except (aiohttp.ClientError, ConnectionError) as error:
            kind = "connection lost" if math.isnan(record.first_s) else "broken stream"
            record.state, record.kind = "failed", kind
            record.message = str(error) or type(error).__name__
        record.end_s = self._now_s()
        return "".join(pieces)

    async def _with_retries(self, record: Record, body: bytes, pieces: list[str]) -> None:
        while True:
            try:
                return await self._stream(record, body, pieces)
            except _Failed as failed:
                if failed.state != "refused":
                    raise
                record.refusals += 1
                if record.refusals > self._target.retries:
                    raise
                await asyncio.sleep(failed.retry_after_s)

    async def _stream(self, record: Record, body: bytes, pieces: list[str]) -> None:
        async with self._http.post(self._url, data=body) as response:
            record.region = response.headers.get(REGION_HEADER, "")
            record.replica = response.headers.get(REPLICA_HEADER, "")
            if response.status != 200:
                raise await _status_failure(response)
            if response.content_type != "text/event-stream":
                raise _Failed("failed", "no event stream", f"the answer is {response.content_type}")
            lines = EventLines()
            last_s, num_pieces, is_whole = 0.0, 0, False
            async for received in response.content.iter_any():
                now_s = self._now_s()
                for payload in lines.feed(received):
                    if payload == DONE:
                        is_whole = True
                        continue
                    piece = _piece(payload)
                    is_whole |= piece.is_finished
                    if piece.text:
                        num_pieces += 1
                        if num_pieces == 1:
                            record.first_s = now_s
                        else:
                            record.gaps_ms.append((now_s - last_s) * 1000)
                        last_s = now_s
                        pieces.append(piece.text)
                        self._on_text()
                    if piece.usage is not None:
                        record.prompt_tokens, record.output_tokens, record.cached_tokens = piece.usage
        if not is_whole:
            raise _Failed("failed", "broken stream", "it ended without [DONE] or a finish_reason")
        record.output_tokens = record.output_tokens or num_pieces
        if not record.output_tokens:
            raise _Failed("failed", "empty answer", "it ended before any text")
        if not num_pieces:  # tokens without text: the first is known by the end
            record.first_s = now_s


def _session(api_key: str | None) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}  # gzip would hold text back
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S),
        headers=headers,
    )


async def first_model(endpoint: str, api_key: str | None) -> str:
    """The first model that the endpoint lists. Raises SearoomError saying why there is none."""
    url = f"{endpoint}/v1/models"
    try:
        async with _session(api_key) as http, asyncio.timeout(CONNECT_TIMEOUT_S), http.get(url) as response:
            body = await response.read()
            if response.status != 200:
                failed = await _status_failure(response)
                hint = "; give its key with --api-key" if response.status == 401 else ""
                raise SearoomError(f"{url}: HTTP {response.status}: {failed.message}{hint}")
    except aiohttp.InvalidURL as error:
        raise SearoomError(f"--endpoint: {endpoint} is not a URL") from error
    except TimeoutError as error:
        raise SearoomError(f"{url}: no answer within {CONNECT_TIMEOUT_S:.0f} s") from error
    except (aiohttp.ClientError, ConnectionError) as error:
        raise SearoomError(f"{url}: {error or type(error).__name__}") from error
    try:
        return str(orjson.loads(body)["data"][0]["id"])
    except (orjson.JSONDecodeError, LookupError, TypeError) as error:
        raise SearoomError(f"{url}: lists no model; name one with --model") from error


def _piece(payload: bytes) -> Piece:
    try:
        piece = read_piece(payload)
    except BadEvent as error:
        raise _Failed("failed", "broken stream", str(error)) from error
    if piece.error is not None:
        code, message = piece.error
        raise _Failed("failed", f"error in the stream {code}".rstrip(), message)
    return piece


async def _status_failure(response: aiohttp.ClientResponse) -> _Failed:
    """A refusal where the server is overloaded and says when to come back, else an error."""
    raw = (await response.read())[:_MAX_ERROR_BYTES]
    try:
        code, message = error_of(orjson.loads(raw))
    except orjson.JSONDecodeError:
        code, message = "", raw[:200].decode(errors="replace")
    kind = f"HTTP {response.status} {code}".rstrip()
    retry_after = response.headers.get("retry-after")
    if response.status in (429, 503) and retry_after is not None:
        return _Failed("refused", kind, message, _seconds(retry_after))
    return _Failed("failed", kind, message or str(response.reason))


def _seconds(retry_after: str) -> float:
    """The header's seconds; 1 where it holds a date."""
    return float(retry_after) if retry_after.strip().isdecimal() else 1.0


def _timeout_kind(record: Record, error: TimeoutError) -> str:
    if isinstance(error, aiohttp.ServerTimeoutError):  # its only limit is that of connecting
        return "no connection in time"
    return "timeout before the first token" if math.isnan(record.first_s) else "timeout in the stream"
