"""POST /v1/chat/completions in its plain form: messages to text, streaming and not."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from penstock import __version__
from penstock.engine.request import EngineRequest, Sampling
from penstock.server import openai_wire as wire
from penstock.server.body import check_range, parse
from penstock.server.exchange import DONE, Exchange
from penstock.server.f32 import rounded
from penstock.server.generation import Generation
from penstock.server.house import House
from penstock.server.openai_models import check_model
from penstock.server.refusal import Refusal, invalid
from penstock.text.stream import TextStream

FINGERPRINT = f"{__version__}-native"
FINISH = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}

# Fields that would change the answer and do nothing yet, with the values that are harmless.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "n": lambda v: v == 1,
    "logprobs": lambda v: v is False,
    "top_logprobs": lambda v: v == 0,
    "presence_penalty": lambda v: v == 0,
    "frequency_penalty": lambda v: v == 0,
    "response_format": lambda v: v.get("type") == "text",
    "tool_choice": lambda v: v in ("none", "auto"),
    "function_call": lambda v: v in ("none", "auto"),
    "min_p": lambda v: v == 0,
    "min_tokens": lambda v: v == 0,
    "modalities": lambda v: v == ["text"],
}
_REFUSED = (
    *_NEUTRAL, "logit_bias", "tools", "functions", "stop_token_ids", "bad_words", "grammar", "guided_json",
    "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "prediction", "chat_template",
    "chat_template_kwargs", "documents",
)  # fmt: skip


class Chat:
    """The route."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def completions(self, exchange: Exchange, raw: bytes) -> None:
        """One completion, whole or as a stream."""
        arrived = time.monotonic()
        body = parse(raw, wire.ChatRequest)
        self._check(body, raw)
        house = self._house
        house.metrics.requests.inc()
        with house.permits.take():
            prompt = await house.render([_message(message) for message in body.messages])
            request = await self._request(exchange, body, prompt)
            stream = TextStream(house.tokenizer, request.prompt_ids, _stops(body), include_stop=False)
            generation = Generation(house, request, stream, arrived)
            if body.stream:
                await self._stream(exchange, generation, body)
            else:
                await generation.collect()
                await exchange.answer_json(self._whole(generation))

    def _check(self, body: wire.ChatRequest, raw: bytes) -> None:
        house = self._house
        check_model(body.model, house)
        for name in _REFUSED:
            value = getattr(body, name)
            neutral = _NEUTRAL.get(name)
            if value is None or value in ([], {}) or (neutral is not None and neutral(value)):
                continue
            raise Refusal(422, f"`{name}` is not supported yet", "not_supported", param=name)
        for name in ("max_tokens", "max_completion_tokens", "top_k", "seed"):
            check_range(name, getattr(body, name), f"$.{name}", raw)
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise invalid("give `max_tokens` or `max_completion_tokens`, not both", "max_tokens")
        if not body.messages:
            raise invalid("`messages` cannot be empty", "messages")
        if len(_stops(body)) > house.config.max_stop_sequences:
            limit, given = house.config.max_stop_sequences, len(_stops(body))
            raise invalid(f"`stop` supports up to {limit} stop sequences. Given: {given}", "stop")

    async def _request(self, exchange: Exchange, body: wire.ChatRequest, prompt: str) -> EngineRequest:
        house = self._house
        # The template prints the special tokens itself.
        ids = await house.encode(prompt, add_special_tokens=False)
        wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        if wanted == 0:
            raise invalid("`max_tokens` must be strictly positive", "max_tokens")
        request = EngineRequest(
            id=house.engine.next_id(),
            prompt_ids=ids,
            max_new_tokens=house.room(len(ids), wanted),
            sampling=_sampling(body),
            ignore_eos=bool(body.ignore_eos),
            salt=exchange.salt,
        )
        house.check(request)
        return request

    async def _stream(self, exchange: Exchange, generation: Generation, body: wire.ChatRequest) -> None:
        identity, created = _identity(), int(time.time())
        usage = body.stream_options is not None and body.stream_options.include_usage

        def chunk(choices: list[wire.ChunkChoice]) -> wire.ChatChunk:
            return wire.ChatChunk(
                id=identity,
                created=created,
                model=self._house.config.name,
                system_fingerprint=FINGERPRINT,
                choices=choices,
            )

        with generation:
            await exchange.start_events([])
            with exchange.kept_alive(self._house.config.keep_alive_seconds):
                async for events in generation:
                    choices = [wire.ChunkChoice(delta=wire.AnswerMessage("assistant", e.piece)) for e in events]
                    if generation.finish_reason:
                        choices[-1].finish_reason = FINISH[generation.finish_reason]
                    await exchange.event(*(chunk([choice]) for choice in choices))
            if usage:
                last = chunk([])
                last.usage = _usage(generation)
                await exchange.event(last)
        await exchange.write(DONE)
        await exchange.end()

    def _whole(self, generation: Generation) -> wire.ChatCompletion:
        choice = wire.Choice(
            message=wire.AnswerMessage("assistant", generation.text),
            finish_reason=FINISH[generation.finish_reason],
        )
        return wire.ChatCompletion(
            id=_identity(),
            created=int(time.time()),
            model=self._house.config.name,
            system_fingerprint=FINGERPRINT,
            choices=[choice],
            usage=_usage(generation),
        )


def _message(message: wire.ChatMessage) -> dict[str, str]:
    """As templates want it. Text parts are joined without anything between them, as TGI does."""
    if message.tool_calls:
        raise Refusal(422, "`tool_calls` is not supported yet", "not_supported", param="messages")
    content = message.content
    if content is None:
        raise invalid("a message without `content`", "messages")
    if not isinstance(content, str):
        content = "".join(part.text for part in content)
    return {"role": message.role, "content": content}


def _stops(body: wire.ChatRequest) -> list[str]:
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def _sampling(body: wire.ChatRequest) -> Sampling:
    """temperature 0 is greedy; without one it samples at 1. top_p 1 and top_k 0 or -1 are off."""
    temperature = 1.0 if body.temperature is None else rounded(body.temperature)
    if temperature < 0:
        raise invalid("`temperature` must be positive, or 0 for greedy decoding", "temperature")
    top_p = 1.0 if body.top_p is None else rounded(body.top_p)
    if not 0 < top_p <= 1:
        raise invalid("`top_p` must be > 0.0 and <= 1.0", "top_p")
    top_k = body.top_k or 0
    if top_k < -1:
        raise invalid("`top_k` must be strictly positive", "top_k")
    penalty = 1.0 if body.repetition_penalty is None else rounded(body.repetition_penalty)
    if temperature == 0:
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=max(top_k, 0),
        repetition_penalty=penalty,
        seed=secrets.randbits(64) if body.seed is None else body.seed,
    )


def _identity() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"


def _usage(generation: Generation) -> wire.Usage:
    prompt, completion = len(generation.request.prompt_ids), generation.generated_tokens
    details = wire.PromptDetails(generation.cached_tokens)
    return wire.Usage(prompt, completion, prompt + completion, details)
