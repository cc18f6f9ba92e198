"""One HTTP request and its answer, on bare ASGI."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol
from urllib.parse import parse_qsl

import msgspec

from penstock.server.refusal import Family, Refusal, incomplete_stream

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON_TYPE = b"application/json"
EVENT_STREAM = b"text/event-stream"
COMMENT = b":\n\n"
DONE = b"data: [DONE]\n\n"  # ends streams under /v1/
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_JSON_CONTENT = re.compile(rb"application/(json|[^;]+\+json)\s*(;.*)?", re.IGNORECASE)


class Flow(Protocol):
    """What leaves towards a client. full: its buffers are, so that sending waits; seconds: how long that may take."""

    seconds: float

    @property
    def full(self) -> bool: ...

    def cut(self) -> None:
        """Drop the connection and what has not been sent."""


class ClientLeft(Exception):
    """The client is gone before its request was whole, or does not read its answer."""


class Exchange:
    """A request and the means to answer it. `client` is what the guard found out about the sender.

    salt: separates the prefix cache of one key's user from another's.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: list[Header] = scope["headers"]
        self.salt: bytes = scope.get("penstock.salt", b"")
        self.extra_headers: list[Header] = scope.get("penstock.headers", [])
        given = self.header(b"x-request-id")
        known = given is not None and _REQUEST_ID.fullmatch(given)
        self.request_id = given if given is not None and known else secrets.token_hex(16).encode()
        self.status = 0  # of the answer, once it has begun
        self.failure = ""  # the type of the error that ended a stream
        self.started = False
        self.finished = False
        self._last_write = 0.0

    def answered_by(self, send: Send) -> Exchange:
        """The same request, whose answer goes to `send` instead of the client."""
        other = Exchange(self._scope, self._receive, send)
        other.request_id = self.request_id
        return other

    def header(self, name: bytes) -> bytes | None:
        """The first header of that (lower case) name."""
        return next((value for key, value in self.headers if key == name), None)

    @property
    def openai(self) -> bool:
        """Whether errors have OpenAI's shape here."""
        return self.path.startswith("/v1/")

    @property
    def family(self) -> Family:
        """Whose shape errors have here."""
        if self.path.startswith("/v1/messages"):
            return "anthropic"
        return "openai" if self.openai else "native"

    async def body(self, limit: int, silence: float) -> bytes:
        """The JSON body, its bytes counted while they arrive.

        limit: bytes; silence: seconds that the client may pause. Raises Refusal 415, 413 or 408.
        """
        if not _JSON_CONTENT.fullmatch(self.header(b"content-type") or b""):
            raise Refusal(415, "Expected request with `Content-Type: application/json`", plain=True)
        return b"".join([part async for part in self.parts(limit, silence)])

    async def parts(self, limit: int, silence: float) -> AsyncIterator[bytes]:
        """The body as it arrives. limit: bytes; silence: seconds that the client may pause. Raises Refusal 413, 408."""
        too_long = Refusal(413, "Failed to buffer the request body: length limit exceeded", plain=True)
        declared = self.header(b"content-length")
        if declared is not None and declared.isdigit() and int(declared[:20]) > limit:
            raise too_long
        size = 0
        while True:
            try:
                async with asyncio.timeout(silence):
                    message = await self._receive()
            except TimeoutError:
                raise Refusal(408, "The request body did not arrive in time", plain=True) from None
            if message["type"] == "http.disconnect":
                raise ClientLeft
            part = message.get("body", b"")
            size += len(part)
            if size > limit:
                raise too_long
            yield part
            if not message.get("more_body", False):
                return

    @property
    def query(self) -> dict[str, str]:
        """The parameters behind the path; of a repeated one the last."""
        return dict(parse_qsl(self._scope.get("query_string", b"").decode("latin-1"), max_num_fields=64))

    async def while_connected(self, work: Awaitable[None]) -> bool:
        """Do the work; stop it, with CancelledError inside it, as soon as the client leaves.

        Call it after the body has been read. False when the client left.
        """
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("an exchange needs a task")
        gone = done = False

        async def watch() -> None:
            nonlocal gone
            while (await self._receive())["type"] != "http.disconnect":
                pass
            if not done and not self.finished:
                gone = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            await work
        except asyncio.CancelledError:
            if not gone:
                raise
            task.uncancel()
        finally:
            done = True
            watcher.cancel()
        return not gone

    async def answer(self, status: int, body: bytes, content_type: bytes = b"", headers: Sequence[Header] = ()) -> None:
        """The whole answer at once."""
        await self._start(status, content_type, [(b"content-length", str(len(body)).encode()), *headers])
        self.finished = True
        await self._send({"type": "http.response.body", "body": body})

    async def answer_json(self, value: object, headers: Sequence[Header] = ()) -> None:
        """200 and a value as compact JSON."""
        await self.answer(200, msgspec.json.encode(value), JSON_TYPE, headers)

    async def refuse(self, refusal: Refusal) -> None:
        """The refusal as this route's family spells it; as an event when the answer is already streaming."""
        if self.finished:
            return
        if self.started:
            if refusal.error_type == "incomplete_generation":
                refusal = incomplete_stream()
            self.failure = refusal.error_type
            await self.event(refusal.openai() if self.openai else refusal.native())
            if self.openai:
                await self.write(DONE)
            await self.end()
            return
        content_type, body = refusal.body(self.family)
        headers = refusal.headers()
        if refusal.status == 408:
            headers.append((b"connection", b"close"))  # the rest of the body may never come
        status = 400 if refusal.status == 422 and self.family == "anthropic" else refusal.status
        await self.answer(status, body, content_type, headers)

    async def start_events(self, headers: list[Header]) -> None:
        """200 and the headers of a stream of server-sent events."""
        stream = [(b"cache-control", b"no-cache"), *headers, (b"x-accel-buffering", b"no")]
        await self._start(200, EVENT_STREAM, stream)

    async def start_content(self, size: int, content_type: bytes) -> None:
        """200 and the headers of so many bytes, which `write` sends."""
        await self._start(200, content_type, [(b"content-length", str(size).encode())])

    async def event(self, *values: object) -> None:
        """Send events, all in one write."""
        await self.write(b"".join(b"data: %b\n\n" % msgspec.json.encode(value) for value in values))

    async def write(self, data: bytes) -> None:
        """Send bytes of a stream as they are."""
        self._last_write = asyncio.get_running_loop().time()
        message = {"type": "http.response.body", "body": data, "more_body": True}
        flow: Flow | None = self._scope.get("penstock.flow")
        if flow is None or not flow.full:
            await self._send(message)
            return
        try:
            async with asyncio.timeout(flow.seconds):
                await self._send(message)
        except TimeoutError:  # the client has stopped reading, and what it has not read fills the buffers
            self.finished = True
            flow.cut()
            raise ClientLeft from None

    async def end(self) -> None:
        """End a stream."""
        self.finished = True
        await self._send({"type": "http.response.body", "body": b""})

    @contextmanager
    def kept_alive(self, seconds: float) -> Iterator[None]:
        """Meanwhile send a comment whenever the stream has been silent for that long."""
        task = asyncio.create_task(self._comment(seconds))
        try:
            yield
        finally:
            task.cancel()

    async def _comment(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        while True:
            rest = self._last_write + seconds - loop.time()
            if rest <= 0:
                with suppress(ClientLeft):  # the connection is cut then, which ends the request elsewhere
                    await self.write(COMMENT)
            else:
                await asyncio.sleep(rest)

    async def _start(self, status: int, content_type: bytes, headers: list[Header]) -> None:
        self.started, self.status = True, status
        self._last_write = asyncio.get_running_loop().time()
        first = [(b"content-type", content_type)] if content_type else []
        identity = [(b"x-request-id", self.request_id), *self.extra_headers]
        await self._send({"type": "http.response.start", "status": status, "headers": [*first, *headers, *identity]})
