"""A small HTTP/1.1 client for streams of server-sent events: many at once, little work for each event.

A load generator must not be what is measured. Each connection is an asyncio protocol with a C parser, an event is
handed over as the bytes of its data, and all events of one read share one look at the clock.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import unquote, urlsplit

import httptools

from penstock.errors import UsageError

CONNECT_SECONDS = 10.0
MAX_BODY = 2**20  # of an answer that is no stream
MAX_EVENT = 2**24

OnEvent = Callable[[bytes, float], bool]  # the data of an event and when it came; True hangs up


@dataclass(frozen=True)
class Address:
    """Where a server listens. prefix: of every path; key: sent as a bearer token."""

    host: str
    port: int
    secure: bool = False
    uds: str | None = None
    prefix: str = ""
    key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, url: str, key: str | None = None) -> Address:
        """From http://, https:// or http+unix://%2Fpath. Raises UsageError."""
        parts = urlsplit(url if "://" in url else f"http://{url}")
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        try:
            if parts.scheme == "http+unix" and parts.netloc:
                return cls("localhost", 80, uds=unquote(parts.netloc), prefix=prefix, key=key)
            if parts.scheme in ("http", "https") and parts.hostname:
                secure = parts.scheme == "https"
                return cls(parts.hostname, parts.port or (443 if secure else 80), secure, prefix=prefix, key=key)
        except ValueError:
            pass
        raise UsageError(f"{url!r} is not the URL of a server.", "", "For example: --url http://127.0.0.1:3000")

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine."""
        return self.uds is not None or self.host in ("127.0.0.1", "localhost", "::1")

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """A whole request, ready to send."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"host: {host}:{self.port}", "accept: */*"]
        if self.key is not None:
            lines.append(f"authorization: Bearer {self.key}")
        if body is not None:
            lines += ["content-type: application/json", f"content-length: {len(body)}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode() + (body or b"")


@dataclass
class Reply:
    """An answer, as much of it as came. body: of one that is no stream; hung_up: by us; error: what broke it."""

    status: int = 0
    retry_after: float | None = None
    body: bytes = b""
    complete: bool = False
    hung_up: bool = False
    error: str = ""


class Connection(asyncio.Protocol):
    """One connection, used for one exchange after another."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._reply = Reply()
        self._on_event: OnEvent | None = None
        self._buffer = bytearray()
        self._events = False
        self._until_close = True  # the answer ends with the connection
        self._now = 0.0
        self.reusable = True

    @classmethod
    async def open(cls, address: Address) -> Connection:
        """Connect. Raises OSError (TimeoutError is one)."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_SECONDS):
            if address.uds is not None:
                _, connection = await loop.create_unix_connection(cls, address.uds)
            else:
                context = ssl.create_default_context() if address.secure else None
                _, connection = await loop.create_connection(cls, address.host, address.port, ssl=context)
        return connection

    async def exchange(self, request: bytes, on_event: OnEvent) -> Reply:
        """Send a request and read its answer to the end. Raises ConnectionError when it breaks off before a status."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the server closed the connection")
        self._done = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)
        self._reply, self._on_event, self._events, self._until_close = Reply(), on_event, False, True
        self._buffer.clear()
        self._transport.write(request)
        try:
            await self._done
        except asyncio.CancelledError:
            self.close()
            raise
        if not self._reply.status:
            raise ConnectionResetError("the server closed the connection without an answer")
        return self._reply

    def close(self) -> None:
        self.reusable = False
        if self._transport is not None:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by descent

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._parser is None:
            self.close()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:  # its cause where an event could not be read
            self._reply.error = str(error.__context__ or error)
            self._finish()
            self.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        self._reply.complete |= error is None and self._until_close and self._reply.status > 0
        self._finish()

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self._events = value.startswith(b"text/event-stream")
        elif name in (b"content-length", b"transfer-encoding"):
            self._until_close = False
        elif name == b"retry-after" and value.isdigit():
            self._reply.retry_after = float(value)

    def on_headers_complete(self) -> None:
        assert self._parser is not None  # noqa: S101 (for mypy)
        self._reply.status = self._parser.get_status_code()
        self.reusable = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        if not self._events:
            self._reply.body = (self._reply.body + data)[:MAX_BODY]
            return
        if b"\r" in data:
            data = data.replace(b"\r", b"")
        self._buffer += data
        end = self._buffer.rfind(b"\n\n")
        if end < 0:
            if len(self._buffer) > MAX_EVENT:
                self.close()
            return
        whole = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        for event in whole.split(b"\n\n"):
            for line in event.split(b"\n"):
                if line.startswith(b"data:") and self._on_event is not None and self._on_event(line[5:], self._now):
                    self._reply.hung_up = True
                    self._finish()
                    self.close()
                    return

    def on_message_complete(self) -> None:
        self._reply.complete = True
        self._finish()

    def _finish(self) -> None:
        self._on_event = None
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


class Pool:
    """Connections to one server that wait for their next exchange."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._idle: list[Connection] = []

    async def exchange(self, request: bytes, on_event: OnEvent) -> Reply:
        """One exchange, on an idle connection or a new one. Raises OSError."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                try:
                    reply = await connection.exchange(request, on_event)
                    break
                except ConnectionResetError:  # the server had grown tired of it
                    continue
        else:
            connection = await Connection.open(self.address)
            reply = await connection.exchange(request, on_event)
        if reply.complete and connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        return reply

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
