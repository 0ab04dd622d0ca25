"""Ingress's own HTTP server, past Serve's proxy: a request through that costs Ingress milliseconds of CPU.

The Ingress replicas of one node share its port, and the kernel spreads connections over them.
"""

from __future__ import annotations

import asyncio
import logging
import socket

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

START_POLL_S = 0.01


class HttpServer:
    """Serves one ASGI application."""

    def __init__(self, app: ASGIApp) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # the application logs for itself
        config = uvicorn.Config(
            CancelledByClients(app),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
        )
        self._server = uvicorn.Server(config)

    async def start(self, host: str, port: int) -> None:
        """Accept connections from now on. Raises OSError where the port is another program's."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        while not self._server.started:  # noqa: ASYNC110 (it tells nobody)
            await asyncio.sleep(START_POLL_S)

    async def drain(self) -> None:
        """Accept none any more, and return when those that came are answered."""
        self._server.should_exit = True
        await self._serving


class CancelledByClients:
    """Cancels the request of a client that leaves. Serve does so too; uvicorn only tells those who ask."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = asyncio.current_task()
        assert request is not None
        watch: asyncio.Task[None] | None = None
        is_client_gone = False

        async def wait_for_the_end() -> None:
            nonlocal is_client_gone
            await receive()  # after the body there is only this to hear
            is_client_gone = True
            request.cancel()

        async def receive_body() -> Message:
            nonlocal watch
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                watch = asyncio.create_task(wait_for_the_end())
            return message

        async def send_response(message: Message) -> None:
            if watch is not None and message["type"] == "http.response.body" and not message.get("more_body"):
                watch.cancel()  # the end of the answer would be heard as the client's
            await send(message)

        try:
            await self._app(scope, receive_body, send_response)
        except asyncio.CancelledError:
            if not is_client_gone:
                raise
            request.uncancel()
        finally:
            if watch is not None:
                watch.cancel()
