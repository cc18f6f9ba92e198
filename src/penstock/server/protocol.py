"""uvicorn, set up our way: bounded headers, no timers while idle, no signal handlers of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from penstock.server.guard import App

MAX_HEADER_BYTES = 65536
MAX_HEADERS = 100
KEEP_ALIVE_SECONDS = 75
CLOSE_SECONDS = 1  # what is still open after a drain


async def _too_large(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"connection", b"close"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 431, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class BoundedProtocol(HttpToolsProtocol):
    """Refuses requests with too many or too long headers."""

    _head = 0  # bytes of the current request line and headers
    _in_head = True

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head that does not end."""
        if self._in_head:
            self._head += len(data)
        super().data_received(data)
        # A head that is whole by now has been judged in on_headers_complete.
        if self._in_head and self._head > MAX_HEADER_BYTES and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 431 \r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()

    def on_message_begin(self) -> None:
        """A new request on the connection."""
        self._in_head, self._head = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Hand the request on, or a refusal in its place."""
        self._in_head = False
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size <= MAX_HEADER_BYTES and len(self.headers) <= MAX_HEADERS:
            super().on_headers_complete()
            return
        app, self.app = self.app, _too_large
        try:
            super().on_headers_complete()
        finally:
            self.app = app


class HttpServer(uvicorn.Server):
    """Serves until `leave` is set; then closes what is open."""

    def __init__(self, app: App) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a bad request is not our event
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                workers=1,
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )
        self.leave = asyncio.Event()

    async def main_loop(self) -> None:
        """Sleep until told to leave; uvicorn's own loop wakes ten times a second."""
        await self.leave.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours."""
        yield

    async def run_on(self, sock: socket.socket) -> None:
        """Accept connections of a listening socket until `leave`."""
        await self.serve(sockets=[sock])
