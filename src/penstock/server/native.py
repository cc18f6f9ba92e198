"""The native (TGI) API: /generate, /generate_stream, POST / and /tokenize."""

from __future__ import annotations

import time

import msgspec

from penstock.engine.request import EngineRequest
from penstock.server import native_answers as answers
from penstock.server import native_rules as rules
from penstock.server import native_wire as wire
from penstock.server.body import parse
from penstock.server.exchange import Exchange, Header
from penstock.server.generation import Generation, collect_all
from penstock.server.house import House
from penstock.text.stream import TextStream


class Native:
    """The routes. Each takes an exchange and the raw body."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def generate(self, exchange: Exchange, raw: bytes) -> None:
        """POST /generate: one object."""
        response, headers = await self._whole(exchange, parse(raw, wire.GenerateRequest), raw)
        await exchange.answer_json(response, headers)

    async def generate_stream(self, exchange: Exchange, raw: bytes) -> None:
        """POST /generate_stream: an event per token."""
        await self._stream(exchange, parse(raw, wire.GenerateRequest), raw)

    async def compat_generate(self, exchange: Exchange, raw: bytes) -> None:
        """POST /: a list of one object, or the stream."""
        body = parse(raw, wire.CompatGenerateRequest)
        if body.parameters.return_full_text is None:
            # TGI's default for text-generation models, and for all without a pipeline tag on the hub.
            body.parameters.return_full_text = True
        if body.stream:
            await self._stream(exchange, body, raw)
            return
        response, headers = await self._whole(exchange, body, raw)
        await exchange.answer_json([response], headers)

    async def tokenize(self, exchange: Exchange, raw: bytes) -> None:
        """POST /tokenize: ids and byte offsets; nothing is checked but the body's types."""
        body = parse(raw, wire.GenerateRequest)
        rules.check_numbers(body, raw)
        found = await self._house.encode_offsets(body.inputs)
        await exchange.answer_json([wire.SimpleToken(*token) for token in found])

    async def _whole(
        self, exchange: Exchange, body: wire.GenerateRequest, raw: bytes
    ) -> tuple[wire.GenerateResponse, list[Header]]:
        house, arrived = self._house, time.monotonic()
        house.metrics.requests.inc()
        rules.check_numbers(body, raw)
        count = rules.best_of(body.parameters, house.config)
        with house.permits.take(count):
            order = rules.order(body, count, house.config, house.limits)
            request = await self._request(exchange, order)
            generations = [
                self._generation(_nth_of_best(request, n, house.engine.next_id()), order, arrived) for n in range(count)
            ]
            collected = await collect_all(generations)
        runs = list(zip(generations, collected, strict=True))
        runs.sort(key=lambda run: run[0].mean_logprob, reverse=True)
        return answers.whole(runs, order), answers.headers(runs[0][0], order.prompt)

    async def _stream(self, exchange: Exchange, body: wire.GenerateRequest, raw: bytes) -> None:
        house, arrived = self._house, time.monotonic()
        house.metrics.requests.inc()
        rules.check_numbers(body, raw)
        rules.check_stream(body.parameters)
        with house.permits.take():
            order = rules.order(body, 1, house.config, house.limits)
            request = await self._request(exchange, order)
            generation = self._generation(request, order, arrived)
            with generation:
                await exchange.start_events(answers.stream_headers(order.prompt))
                with exchange.kept_alive(house.config.keep_alive_seconds):
                    count = 0
                    async for events in generation:
                        await exchange.event(*answers.stream_events(generation, events, count, order))
                        count += len(events)
            await exchange.end()

    async def _request(self, exchange: Exchange, order: rules.Order) -> EngineRequest:
        house = self._house
        ids = await house.encode(order.prompt, add_special_tokens=True)
        if order.truncate is not None:
            ids = _truncated(ids, order.truncate, house.tokenizer.bos_id)
        request = EngineRequest(
            id=house.engine.next_id(),
            prompt_ids=ids,
            max_new_tokens=house.room(len(ids), order.max_new_tokens),
            sampling=order.sampling,
            logprobs=True,
            top_n_tokens=order.top_n_tokens,
            prompt_logprobs=order.prefill,
            salt=exchange.salt,
        )
        house.check(request)
        return request

    def _generation(self, request: EngineRequest, order: rules.Order, arrived: float) -> Generation:
        stream = TextStream(self._house.tokenizer, request.prompt_ids, order.stop)
        return Generation(self._house, request, stream, arrived)


def _nth_of_best(request: EngineRequest, nth: int, new_id: int) -> EngineRequest:
    """The nth of best_of: the same request with an id and a stream of draws of its own."""
    if nth == 0:
        return request
    seed = (request.sampling.seed + nth * 0x9E3779B97F4A7C15) % 2**64
    sampling = msgspec.structs.replace(request.sampling, seed=seed)
    return msgspec.structs.replace(request, id=new_id, sampling=sampling)


def _truncated(ids: list[int], keep: int, bos_id: int | None) -> list[int]:
    """The last `keep` ids; a leading BOS stays where there is room for more than it."""
    if len(ids) <= keep:
        return ids
    if keep > 1 and ids[0] == bos_id:
        return [ids[0], *ids[1 - keep :]]
    return ids[-keep:]
