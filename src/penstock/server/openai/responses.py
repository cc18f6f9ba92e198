"""POST /v1/responses: OpenAI's newer shape of a chat, text and tools. Nothing is stored between requests."""

from __future__ import annotations

import secrets
import time
from typing import Any

from penstock.server.body import check_range, parse
from penstock.server.exchange import Exchange
from penstock.server.house import House
from penstock.server.openai import responses_wire as wire
from penstock.server.openai.fields import Neutral, look_over, unsupported
from penstock.server.openai.models import check_model
from penstock.server.openai.narration import narrate
from penstock.server.openai.responses_events import Narrator
from penstock.server.openai.responses_input import messages_of
from penstock.server.openai.turn import begin
from penstock.server.openai.wire import ChatRequest, Sampled
from penstock.server.refusal import invalid

LOGPROBS = "message.output_text.logprobs"  # an entry of `include`

_UNSUPPORTED: dict[str, Neutral] = {
    "background": lambda value: value is False,
    "conversation": lambda value: False,
    "previous_response_id": lambda value: False,
    "prompt": lambda value: False,
    "truncation": lambda value: value == "disabled",
}
_HARMLESS = frozenset({"max_tool_calls"})  # bounds OpenAI's own tools, which are not here


class Responses:
    """The route."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def responses(self, exchange: Exchange, raw: bytes) -> None:
        """One answer."""
        arrived = time.monotonic()
        house = self._house
        body = parse(raw, wire.ResponsesRequest)
        adapter = check_model(body.model, house)
        look_over(exchange, raw, wire.ResponsesRequest, house.config.strict, _UNSUPPORTED, _HARMLESS)
        check_range("max_output_tokens", body.max_output_tokens, "$.max_output_tokens", raw)
        house.metrics.requests.inc()
        with house.permits.take():
            turn = await begin(exchange, house, _chat(body), raw, arrived)
            response = self._response(body, house.model_name(adapter))
            narrator = Narrator(response, turn, house.tokenizer)
            await narrate(exchange, house, turn, narrator, bool(body.stream))
            if not body.stream:
                await exchange.answer_json(narrator.response)

    def _response(self, body: wire.ResponsesRequest, model: str) -> wire.Response:
        return wire.Response(
            id=f"resp_{secrets.token_hex(12)}",
            created_at=int(time.time()),
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=model,
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning={"effort": None, "summary": None, **(body.reasoning or {})},
            temperature=1.0 if body.temperature is None else body.temperature,
            text={"format": {"type": "text"}, **(body.text or {})},
            tool_choice="auto" if body.tool_choice is None else body.tool_choice,
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            user=body.user,
            metadata=body.metadata or {},
        )


def _chat(body: wire.ResponsesRequest) -> ChatRequest:
    """The same request in the shape of /v1/chat/completions. Raises Refusal 422."""
    if body.n not in (None, 1):
        raise unsupported("n", "a response has one answer")
    if body.max_output_tokens == 0:
        raise invalid("`max_output_tokens` must be strictly positive", "max_output_tokens")
    shared: dict[str, Any] = {name: getattr(body, name) for name in Sampled.__struct_fields__}
    chat = ChatRequest(messages=messages_of(body.input, body.instructions), **shared)
    if body.max_output_tokens is not None:
        chat.max_tokens = body.max_output_tokens
    chat.tools, chat.tool_choice, chat.parallel_tool_calls = body.tools, body.tool_choice, body.parallel_tool_calls
    chat.chat_template_kwargs = body.chat_template_kwargs
    chat.logprobs = body.top_logprobs is not None or LOGPROBS in (body.include or [])
    chat.top_logprobs = body.top_logprobs
    chat.reasoning_effort = (body.reasoning or {}).get("effort")
    form = (body.text or {}).get("format")
    if form is not None and chat.response_format is None:
        chat.response_format = _format(form)
    return chat


def _format(form: Any) -> dict[str, Any]:
    """`text.format`: like `response_format`, but the schema lies beside the type."""
    if not isinstance(form, dict):
        raise invalid("`text.format` must be an object with a `type`", "text")
    if form.get("type") == "json_schema" and "json_schema" not in form:
        return {"type": "json_schema", "json_schema": form}
    return form
