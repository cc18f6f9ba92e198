"""POST /v1/messages and /v1/messages/count_tokens: the chat in the shape that Anthropic's clients speak."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from penstock.server.anthropic import wire
from penstock.server.anthropic.events import Narrator
from penstock.server.anthropic.input import chat_of
from penstock.server.body import check_range, parse
from penstock.server.exchange import Exchange
from penstock.server.house import House
from penstock.server.openai.fields import Neutral, look_over
from penstock.server.openai.models import check_model
from penstock.server.openai.turn import Turn, begin, read_prompt
from penstock.server.refusal import Refusal, invalid

Body = TypeVar("Body", bound=wire.CountRequest)

_UNSUPPORTED: dict[str, Neutral] = {
    "container": lambda value: False,
    "mcp_servers": lambda value: False,
    "context_management": lambda value: False,
}
_HARMLESS = frozenset({"betas", "cache_control", "inference_geo", "speed"})


class Messages:
    """The routes."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def messages(self, exchange: Exchange, raw: bytes) -> None:
        """One answer."""
        arrived = time.monotonic()
        house = self._house
        body = self._parsed(exchange, raw, wire.MessagesRequest)
        check_range("max_tokens", body.max_tokens, "$.max_tokens", raw)
        if body.max_tokens == 0:
            raise invalid("`max_tokens` must be strictly positive", "max_tokens")
        house.metrics.requests.inc()
        with house.permits.take():
            turn = await begin(exchange, house, chat_of(body), raw, arrived)
            message = wire.Message(
                id=f"msg_{secrets.token_hex(12)}", model=house.config.name, content=[], usage=_usage(turn)
            )
            if body.stream:
                await self._stream(exchange, turn, message)
            else:
                narrator = Narrator(message, lambda event: None)
                async with turn.runs:
                    await self._narrate(turn, narrator)
                await exchange.answer_json(narrator.message)

    async def count_tokens(self, exchange: Exchange, raw: bytes) -> None:
        """How long a conversation is as a prompt."""
        body = self._parsed(exchange, raw, wire.CountRequest)
        prompt = await read_prompt(self._house, chat_of(body))
        await exchange.answer_json({"input_tokens": len(prompt.ids)})

    def _parsed(self, exchange: Exchange, raw: bytes, kind: type[Body]) -> Body:
        exchange.extra_headers = [*exchange.extra_headers, (b"request-id", exchange.request_id)]
        body = parse(raw, kind)
        check_model(body.model, self._house)
        look_over(exchange, raw, kind, self._house.config.strict, _UNSUPPORTED, _HARMLESS)
        return body

    async def _stream(self, exchange: Exchange, turn: Turn, message: wire.Message) -> None:
        events: list[bytes] = []
        narrator = Narrator(message, events.append)

        async def flush() -> None:
            data, events[:] = b"".join(events), []
            if data:
                await exchange.write(data)

        async with turn.runs:
            await exchange.start_events([])
            narrator.begin()
            await flush()
            try:
                with exchange.kept_alive(self._house.config.keep_alive_seconds):
                    await self._narrate(turn, narrator, flush)
            except Refusal as refusal:
                narrator.fail(refusal.anthropic())
                await flush()
                await exchange.end()
                raise
        await exchange.end()

    @staticmethod
    async def _narrate(turn: Turn, narrator: Narrator, flush: Callable[[], Awaitable[None]] | None = None) -> None:
        voice = turn.voices[0]
        async for ((_, tokens),) in turn.runs:
            narrator.tell(voice.read(tokens))
            if flush is not None:
                await flush()
        narrator.end(voice.finish_reason or "stop", voice.generation.stop_string, _usage(turn))
        if flush is not None:
            await flush()


def _usage(turn: Turn) -> wire.MessagesUsage:
    cached = turn.cached_tokens
    fresh = len(turn.prompt.ids) - cached
    return wire.MessagesUsage(input_tokens=fresh, cache_read_input_tokens=cached, output_tokens=turn.completion_tokens)
