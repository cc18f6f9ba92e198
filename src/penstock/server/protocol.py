"""uvicorn, set up our way: bounded headers, no timers while idle, no signal handlers of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from penstock.server.guard import App

MAX_HEADER_BYTES = 65536
MAX_HEADERS = 100
KEEP_ALIVE_SECONDS = 75
CLOSE_SECONDS = 1  # what is still open after a drain
SEND_BUFFER = 131072  # bytes that the kernel keeps for a client that does not read; it takes twice as many
_LATE = b"HTTP/1.1 408 \r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


async def _too_large(scope: Any, receive: Any, send: Any) -> None:
    headers = [(b"connection", b"close"), (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 431, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


class BoundedProtocol(HttpToolsProtocol):
    """Refuses requests with too many or too long headers, and clients that take too long to send or to read."""

    header_seconds = 10.0  # until the head of a request is whole
    unread_seconds = 60.0  # that a client may leave a stream unread while the buffers are full
    _head = 0  # bytes of the current request line and headers
    _in_head = True
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client is there; its request must follow."""
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop_timer()
        super().connection_lost(exc)

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
        if self._timer is None:
            self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Hand the request on, or a refusal in its place."""
        self._in_head = False
        self._stop_timer()
        self.scope["penstock.flow"] = _Flow(self)  # type: ignore[typeddict-unknown-key]
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if size <= MAX_HEADER_BYTES and len(self.headers) <= MAX_HEADERS:
            super().on_headers_complete()
            if self.parser.get_http_version() == "1.0":
                _without_chunks(self.cycle)
            return
        app, self.app = self.app, _too_large
        try:
            super().on_headers_complete()
        finally:
            self.app = app

    def _expect_head(self) -> None:
        self._timer = self.loop.call_later(self.header_seconds, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        """The head of a request did not come in time; an answer that is still being sent goes on."""
        self._timer = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering and not self.transport.is_closing():
            self.transport.write(_LATE)
            self.transport.close()


def _without_chunks(cycle: RequestResponseCycle) -> None:
    """HTTP/1.0 knows no chunks: a body whose length is not told ends with the connection."""
    send, unframed = cycle.send, False

    async def plain(message: Any) -> None:
        nonlocal unframed
        if message["type"] == "http.response.start":
            unframed = all(name != b"content-length" for name, _ in message["headers"])
            if unframed:
                cycle.chunked_encoding = False
        elif unframed:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.send = plain  # type: ignore[method-assign]


class _Flow:
    """What leaves on one connection, as `exchange.Flow` wants it."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        self.seconds = protocol.unread_seconds
        self._protocol = protocol

    @property
    def full(self) -> bool:
        return bool(self._protocol.flow.write_paused)

    def cut(self) -> None:
        self._protocol.transport.abort()


class HttpServer(uvicorn.Server):
    """Serves until `leave` is set; then closes what is open."""

    def __init__(self, app: App, header_seconds: float = 10.0, unread_seconds: float = 60.0) -> None:
        limits = {"header_seconds": header_seconds, "unread_seconds": unread_seconds}
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # a bad request is not our event
        super().__init__(
            uvicorn.Config(
                app,
                http=type("Protocol", (BoundedProtocol,), limits),
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
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # the connections inherit it
        await self.serve(sockets=[sock])
