"""The native (TGI) API: /generate, /generate_stream, POST /, /tokenize and /chat_tokenize."""

from __future__ import annotations

import time

from penstock.engine.request import EngineRequest, Grammar
from penstock.server.body import parse
from penstock.server.exchange import Exchange, Header
from penstock.server.generation import Generation, collect_all, nth
from penstock.server.house import House
from penstock.server.native import answers, rules, wire
from penstock.server.native.grammar import grammar_of
from penstock.server.openai.turn import read_prompt
from penstock.server.openai.wire import ChatRequest
from penstock.server.refusal import invalid
from penstock.text.grammar import GrammarRefused
from penstock.text.stream import TextStream
from penstock.vision.sources import split_markdown


class Native:
    """The routes. Each takes an exchange and the raw body."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def generate(self, exchange: Exchange, raw: bytes) -> None:
        """POST /generate: one object."""
        response, headers = await self.whole(exchange, parse(raw, wire.GenerateRequest))
        await exchange.answer_json(response, headers)

    async def generate_stream(self, exchange: Exchange, raw: bytes) -> None:
        """POST /generate_stream: an event per token."""
        await self._stream(exchange, parse(raw, wire.GenerateRequest))

    async def compat_generate(self, exchange: Exchange, raw: bytes) -> None:
        """POST /: a list of one object, or the stream."""
        body = parse(raw, wire.CompatGenerateRequest)
        if body.parameters.return_full_text is None:
            # TGI's default for text-generation models, and for all without a pipeline tag on the hub.
            body.parameters.return_full_text = True
        if body.stream:
            await self._stream(exchange, body)
            return
        response, headers = await self.whole(exchange, body)
        await exchange.answer_json([response], headers)

    async def tokenize(self, exchange: Exchange, raw: bytes) -> None:
        """POST /tokenize: ids and byte offsets; nothing is checked but the body's types."""
        body = parse(raw, wire.GenerateRequest)
        found = await self._house.encode_offsets(body.inputs)
        await exchange.answer_json([wire.SimpleToken(*token) for token in found])

    async def chat_tokenize(self, exchange: Exchange, raw: bytes) -> None:
        """POST /chat_tokenize: a conversation's prompt, its ids and byte offsets."""
        body = parse(raw, ChatRequest)
        self._house.metrics.requests.inc()
        prompt = await read_prompt(self._house, body)
        found = await self._house.encode_offsets(prompt.text, add_special_tokens=False)
        await exchange.answer_json(wire.ChatTokens([wire.SimpleToken(*token) for token in found], prompt.text))

    async def whole(self, exchange: Exchange, body: wire.GenerateRequest) -> tuple[wire.GenerateResponse, list[Header]]:
        """The answer to one prompt, and the headers that go with it. Raises Refusal."""
        house, arrived = self._house, time.monotonic()
        house.metrics.requests.inc()
        count = rules.best_of(body.parameters, house.config)
        with house.permits.take(count):
            order = rules.order(body, count, house.config, house.limits, house.engine.adapters)
            request = await self._request(exchange, order)
            generations = [
                self._generation(nth(request, n, house.engine.next_id()), order, arrived) for n in range(count)
            ]
            collected = await collect_all(generations)
        runs = list(zip(generations, collected, strict=True))
        runs.sort(key=lambda run: run[0].mean_logprob, reverse=True)
        return answers.whole(runs, order), answers.headers(runs[0][0], order.prompt)

    async def _stream(self, exchange: Exchange, body: wire.GenerateRequest) -> None:
        house, arrived = self._house, time.monotonic()
        house.metrics.requests.inc()
        rules.check_stream(body.parameters)
        with house.permits.take():
            order = rules.order(body, 1, house.config, house.limits, house.engine.adapters)
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
        pieces, addresses = split_markdown(order.prompt, only_data=not house.images.taken)
        if addresses:
            house.images.check(len(addresses), "inputs")
        seen = await house.images.prepare(house.images.inline.join(pieces), addresses)
        ids = await house.encode(seen.text, add_special_tokens=seen.special is not False)
        if order.truncate is not None:
            if seen.images and len(ids) > order.truncate:
                raise invalid(f"`truncate` would cut into the images of a prompt of {len(ids)} tokens")
            ids = _truncated(ids, order.truncate, house.tokenizer.bos_id)
        room = house.room(len(ids), order.max_new_tokens)
        request = EngineRequest(
            id=house.engine.next_id(),
            prompt_ids=ids,
            max_new_tokens=room,
            sampling=order.sampling,
            logprobs=True,
            top_n_tokens=order.top_n_tokens,
            prompt_logprobs=order.prefill,
            grammar=None if order.grammar is None else await self._grammar(order.grammar, exchange.key_name),
            images=seen.images,
            deterministic=order.deterministic,
            adapter=order.adapter,
            salt=exchange.salt,
        )
        house.check(request)
        return request

    async def _grammar(self, asked: wire.Grammar, who: str) -> Grammar:
        try:
            return await self._house.grammars.compile_grammar(grammar_of(asked, self._house.config), who)
        except GrammarRefused as refused:
            raise invalid(refused.what) from None

    def _generation(self, request: EngineRequest, order: rules.Order, arrived: float) -> Generation:
        continued = self._house.limits.continued(request.prompt_ids)
        stream = TextStream(self._house.tokenizer, continued, order.stop)
        return Generation(self._house, request, stream, arrived)


def _truncated(ids: list[int], keep: int, bos_id: int | None) -> list[int]:
    """The last `keep` ids; a leading BOS stays where there is room for more than it."""
    if len(ids) <= keep:
        return ids
    if keep > 1 and ids[0] == bos_id:
        return [ids[0], *ids[1 - keep :]]
    return ids[-keep:]
