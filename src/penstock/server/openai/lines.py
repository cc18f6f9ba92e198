"""Requests that come from a file instead of a connection: the same routes, asked from inside.

A request that was running when the engine's process died is tried again, alone, for it may be the one that kills it;
when the process dies again, the request is set aside with an error.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable

import msgspec

from penstock.batch.openai import AnswerLine, BatchLine, LineError, LineResponse, answer_line, any_json
from penstock.server.exchange import Exchange, Message
from penstock.server.house import House
from penstock.server.openai.chat import Chat
from penstock.server.openai.completions import Completions
from penstock.server.openai.embeddings import Embeddings
from penstock.server.openai.responses import Responses
from penstock.server.refusal import Refusal, internal

log = logging.getLogger("penstock.server")

ENGINE_TROUBLE = (424, 500, 503)  # statuses that the death of the engine's process leads to
ATTEMPTS = 2  # of a request whose engine dies
_NAP = 0.1  # seconds between two looks at an engine that is restarting


class _Streams(msgspec.Struct):
    stream: object = None


class LineAnswerer:
    """Answers the lines of batches. house: one that is apart from the connections', see `House.aside`."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._alone = asyncio.Lock()
        self._routes: dict[str, Callable[[Exchange, bytes], Awaitable[None]]] = {
            "/v1/chat/completions": Chat(house).completions,
            "/v1/completions": Completions(house).completions,
            "/v1/embeddings": Embeddings(house).embeddings,
            "/v1/responses": Responses(house).responses,
        }

    async def answer(self, line: BatchLine, salt: bytes) -> AnswerLine:
        """What the route says, whatever it is."""
        engine = self._house.engine
        for attempt in range(1, ATTEMPTS + 1):
            while not engine.healthy and not engine.gave_up.is_set():
                await asyncio.sleep(_NAP)
            deaths = engine.restarts
            if attempt == 1:
                response = await self._ask(line, salt)
            else:
                async with self._alone:
                    response = await self._ask(line, salt)
            if response.status_code not in ENGINE_TROUBLE or (engine.restarts == deaths and engine.healthy):
                return answer_line(line, response)
            while not engine.healthy and not engine.gave_up.is_set():
                await asyncio.sleep(_NAP)
        text = f"the engine died {ATTEMPTS} times while this request was running, so it was set aside"
        return answer_line(line, None, LineError("engine_died", text))

    async def _ask(self, line: BatchLine, salt: bytes) -> LineResponse:
        request_id = secrets.token_hex(16)
        sent: list[bytes] = []
        status = 0

        async def send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            sent.append(message.get("body", b""))

        async def receive() -> Message:
            await asyncio.Event().wait()  # this client neither sends more nor leaves
            raise AssertionError

        scope = {
            "type": "http",
            "method": "POST",
            "path": line.url,
            "headers": [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())],
            "penstock.salt": salt,
        }
        exchange = Exchange(scope, receive, send)
        raw = bytes(line.body)
        try:
            if _streams(raw):
                raise Refusal(400, "`stream` is not supported in a batch", "not_supported", param="stream")
            await self._routes[line.url](exchange, raw)
        except Refusal as refusal:
            return LineResponse(refusal.status, request_id, any_json(refusal.openai()))
        except Exception:
            log.exception("request %s of a batch failed", request_id)
            return LineResponse(500, request_id, any_json(internal().openai()))
        return LineResponse(status, request_id, msgspec.Raw(b"".join(sent)))


def _streams(raw: bytes) -> bool:
    try:
        return msgspec.json.decode(raw, type=_Streams).stream is True
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False  # the route says what is wrong
