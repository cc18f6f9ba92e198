"""POST /v1/messages and /v1/messages/count_tokens: the chat in the shape that Anthropic's clients speak."""

from __future__ import annotations

import secrets
import time
from typing import TypeVar

from penstock.server.anthropic import wire
from penstock.server.anthropic.events import Narrator, usage
from penstock.server.anthropic.input import chat_of
from penstock.server.body import check_range, parse
from penstock.server.exchange import Exchange
from penstock.server.house import House
from penstock.server.openai.fields import Neutral, look_over
from penstock.server.openai.models import check_model
from penstock.server.openai.narration import narrate
from penstock.server.openai.turn import begin, read_prompt
from penstock.server.refusal import invalid

Body = TypeVar("Body", bound=wire.CountRequest)

_UNSUPPORTED: dict[str, Neutral] = {
    "container": lambda value: False,
    "mcp_servers": lambda value: False,
    "context_management": lambda value: False,
}
_HARMLESS = frozenset({"betas", "cache_control", "diagnostics", "inference_geo", "speed", "user_profile_id"})


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
                id=f"msg_{secrets.token_hex(12)}",
                model=house.model_name(turn.order.adapter),
                content=[],
                usage=usage(turn),
            )
            await narrate(exchange, house, turn, Narrator(message, turn), bool(body.stream))
            if not body.stream:
                await exchange.answer_json(message)

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
