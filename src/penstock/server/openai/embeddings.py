"""POST /v1/embeddings: the mean of the model's final hidden states over a text, scaled to length 1.

A language model that was not trained for embeddings gives coarse ones; they compare texts, no more. `dimensions` keeps
the first so many numbers and scales them to length 1 again, as OpenAI does.
"""

from __future__ import annotations

import array
import asyncio
import base64
import math
import sys
import time
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from penstock.engine.request import Embed, EngineRequest
from penstock.server.body import parse
from penstock.server.exchange import Exchange
from penstock.server.generation import Generation
from penstock.server.house import House
from penstock.server.openai.fields import look_over
from penstock.server.openai.models import check_model
from penstock.server.openai.prompts import TextPrompt, read_prompts
from penstock.server.refusal import Refusal, generation_failed, invalid
from penstock.text.stream import TextStream

MAX_INPUTS = 2048  # OpenAI's bound
AT_ONCE = 8  # inputs of one request that run together


class EmbeddingRequest(msgspec.Struct, kw_only=True):
    """Body of the route."""

    input: str | list[Any]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    add_special_tokens: bool | None = None


class Embedding(msgspec.Struct, kw_only=True):
    """One input's vector: numbers, or base64 of little-endian 32-bit floats."""

    object: str = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(msgspec.Struct):
    """Token counts."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(msgspec.Struct, kw_only=True):
    """The answer."""

    object: str = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Embeddings:
    """The route."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def embeddings(self, exchange: Exchange, raw: bytes) -> None:
        """A vector for every input."""
        arrived = time.monotonic()
        house = self._house
        body = parse(raw, EmbeddingRequest)
        adapter = check_model(body.model, house)
        look_over(exchange, raw, EmbeddingRequest, house.config.strict)
        house.metrics.requests.inc()
        if body.dimensions is not None and body.dimensions < 1:
            raise invalid("`dimensions` must be strictly positive", "dimensions")
        prompts = await read_prompts(house, body.input, "input", MAX_INPUTS, body.add_special_tokens is not False)
        width = min(len(prompts), AT_ONCE)
        with house.permits.take(width):
            requests = [self._request(exchange, prompt, adapter) for prompt in prompts]
            vectors = await self._all(requests, width, arrived)
        if body.dimensions is not None:
            if body.dimensions > len(vectors[0]):
                words = f"`dimensions` must be <= {len(vectors[0])}, which this model's embeddings have"
                raise invalid(f"{words}. Given: {body.dimensions}", "dimensions")
            vectors = [_unit(vector[: body.dimensions]) for vector in vectors]
        show = _base64 if body.encoding_format == "base64" else list
        tokens = sum(len(prompt.ids) for prompt in prompts)
        await exchange.answer_json(
            EmbeddingList(
                data=[Embedding(index=n, embedding=show(vector)) for n, vector in enumerate(vectors)],
                model=house.model_name(adapter),
                usage=EmbeddingUsage(tokens, tokens),
            )
        )

    def _request(self, exchange: Exchange, prompt: TextPrompt, adapter: str | None) -> EngineRequest:
        house = self._house
        longest = house.limits.max_input_tokens
        if len(prompt.ids) > longest:
            raise invalid(f"`inputs` must have less than {longest} tokens. Given: {len(prompt.ids)}", "input")
        request = EngineRequest(
            id=house.engine.next_id(),
            prompt_ids=prompt.ids,
            max_new_tokens=0,
            embed=Embed(),
            priority=house.priority,
            adapter=adapter,
            salt=exchange.salt,
        )
        house.check(request)
        return request

    async def _all(self, requests: list[EngineRequest], width: int, arrived: float) -> list[array.array[float]]:
        """The vectors in order; `width` inputs run at a time. When one fails or the client leaves, the rest end."""
        found: dict[int, array.array[float]] = {}
        waiting = iter(enumerate(requests))

        async def work() -> None:
            for n, request in waiting:
                found[n] = await self._vector(request, arrived)

        tasks = [asyncio.create_task(work()) for _ in range(width)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return [found[n] for n in range(len(requests))]

    async def _vector(self, request: EngineRequest, arrived: float) -> array.array[float]:
        generation = Generation(self._house, request, TextStream(self._house.tokenizer, request.prompt_ids), arrived)
        await generation.collect()
        if generation.embedding is None:
            raise generation_failed("the engine made no embedding")
        return _unit(array.array("f", generation.embedding))


def _unit(vector: Iterable[float]) -> array.array[float]:
    """The vector at length 1, as 32-bit floats."""
    values = list(vector)
    length = math.sqrt(math.fsum(value * value for value in values))
    if not length > 0 or not math.isfinite(length):
        raise Refusal(424, "Request failed during generation: the model's numbers are not finite", "generation")
    return array.array("f", [value / length for value in values])


def _base64(vector: array.array[float]) -> str:
    if sys.byteorder == "big":
        vector = array.array("f", vector)
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode()
