"""One engine request on its way to text: what every route builds on, streaming or not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import msgspec

from penstock.engine.client import EngineUnavailable
from penstock.engine.output import SequenceOutput
from penstock.engine.output import Token as EngineToken
from penstock.engine.request import EngineRequest
from penstock.server.f32 import shortest
from penstock.server.house import House
from penstock.server.refusal import generation_failed, incomplete, invalid, unhealthy
from penstock.server.timings import Timings
from penstock.text.stream import TextStream
from penstock.text.tokenizer import Tokenizer


@dataclass(slots=True)
class TokenEvent:
    """One generated token.

    text: as shown, special tokens spelt out; piece: what it adds to the answer's text.
    """

    id: int
    text: str
    piece: str
    logprob: float | None
    special: bool
    top: list[tuple[int, float | None]] = field(default_factory=list)


class Generation:
    """Runs one EngineRequest. Inside `with generation:`, iterate it for lists of TokenEvent, one list a step.

    The last list ends the answer: then `finish_reason` is set and `text` is whole. Entering and iterating
    raise Refusal when the engine is down, refuses or fails. Leaving early, in whatever phase, aborts the
    request.
    """

    def __init__(self, house: House, request: EngineRequest, stream: TextStream, arrived: float) -> None:
        self.request = request
        self.finish_reason = ""
        self.generated_tokens = 0
        self.prompt_logprobs: list[float | None] | None = None
        self.prompt_top: list[list[tuple[int, float]]] | None = None
        self.embedding: bytes | None = None  # float32
        self.cached_tokens = 0
        self.logprob_sum = 0.0
        self.timings = Timings(arrived)
        self._house, self._stream = house, stream
        self._outputs: AsyncIterator[SequenceOutput] | None = None
        self._failure = ""

    @property
    def text(self) -> str:
        """The answer's text so far, special tokens left out."""
        return self._stream.text

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer."""
        return self._stream.stop_string if self.finish_reason == "stop_sequence" else None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        return self._house.tokenizer

    @property
    def mean_logprob(self) -> float:
        """What best_of compares."""
        return self.logprob_sum / max(self.generated_tokens, 1)

    def prefill(self) -> list[tuple[int, str, float | None]]:
        """(id, text, logprob) of the tokens that the decoder was given, where they were asked for: the prompt's, or the
        one that it begins with where an encoder reads the prompt."""
        logprobs, start_id = self.prompt_logprobs or [], self._house.limits.start_id
        text, ids = self._house.tokenizer.token_text, self.request.prompt_ids if start_id is None else [start_id]
        return [(i, text(i), shortest(p)) for i, p in zip(ids, logprobs, strict=False)]

    def __enter__(self) -> Generation:
        self.timings.submitted = time.monotonic()
        self._house.metrics.submitted(len(self.request.prompt_ids), self.request.max_new_tokens)
        try:
            self._outputs = self._house.engine.submit(self.request)
        except EngineUnavailable:
            self._house.metrics.failed("generation")
            raise unhealthy() from None
        return self

    def __exit__(self, *_: object) -> None:
        if self.finish_reason in ("", "stop_sequence"):
            self._house.engine.abort(self.request.id)
        if self.finish_reason:
            self._house.metrics.finished(self.timings, self.generated_tokens)
        else:
            self._house.metrics.failed(self._failure or "dropped")

    def __aiter__(self) -> AsyncIterator[list[TokenEvent]]:
        return self

    async def __anext__(self) -> list[TokenEvent]:
        if self.finish_reason or self._outputs is None:
            raise StopAsyncIteration
        while True:
            try:
                output = await anext(self._outputs)
            except StopAsyncIteration:
                self._failure = "incomplete"
                raise incomplete() from None
            if self.finish_reason:  # ended by `stop` meanwhile
                raise StopAsyncIteration
            events = self._read(output)
            if events or self.finish_reason:
                return events

    def stop(self) -> None:
        """End the answer here: what it says is complete."""
        self.finish_reason = self.finish_reason or "stop_sequence"

    async def collect(self) -> list[TokenEvent]:
        """The whole run: all events at once."""
        with self:
            return [event async for step in self for event in step]

    def _read(self, output: SequenceOutput) -> list[TokenEvent]:
        now = time.monotonic()
        timings = self.timings
        if output.queue_seconds is not None and timings.submitted is not None:
            timings.started = min(timings.submitted + output.queue_seconds, now)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
            self.prompt_top = output.prompt_top
        if output.embedding is not None:
            self.embedding = output.embedding
        self.cached_tokens = max(self.cached_tokens, output.cached_tokens)
        empty = not output.tokens and self.request.max_new_tokens > 0
        if output.finish in ("error", "aborted") or (output.finish and empty):
            self._fail(output)
        if output.tokens:
            if timings.first is None:
                timings.first = now
                self._house.metrics.first_token(now - timings.arrived)
            elif timings.last is not None:
                self._house.metrics.next_tokens(now - timings.last, len(output.tokens))
            timings.last = now
        events: list[TokenEvent] = []
        for token in output.tokens:
            events.append(self._event(token))
            if self._stream.stopped:
                # The length outranks a stop string that the very last token completes.
                whole = self.generated_tokens >= self.request.max_new_tokens
                self.finish_reason = "length" if whole else "stop_sequence"
                return events
        if output.finish is not None:
            self.finish_reason = output.finish
            rest = self._stream.finish()
            if events:
                events[-1].piece += rest
                events[-1].text = self._stream.shown
        return events

    def _event(self, token: EngineToken) -> TokenEvent:
        piece = self._stream.push(token.id)
        self.generated_tokens += 1
        self.logprob_sum += token.logprob or 0.0
        return TokenEvent(
            token.id,
            self._stream.shown,
            piece,
            shortest(token.logprob),
            token.id in self._house.tokenizer.special_ids,
            [(i, shortest(p)) for i, p in token.top],
        )

    def _fail(self, output: SequenceOutput) -> NoReturn:
        self._failure = "validation" if output.invalid else "generation"
        if output.invalid:
            refusal = invalid(output.error or "the request is not valid")
        elif output.finish == "error":
            refusal = generation_failed(output.error or "the engine stopped")
        else:
            refusal = incomplete()
        refusal.counted = True
        raise refusal


def nth(request: EngineRequest, number: int, new_id: int) -> EngineRequest:
    """The nth of several answers to one prompt: the same request with an id and a stream of draws of its own."""
    if number == 0:
        return request
    seed = (request.sampling.seed + number * 0x9E3779B97F4A7C15) % 2**64
    sampling = msgspec.structs.replace(request.sampling, seed=seed)
    return msgspec.structs.replace(request, id=new_id, sampling=sampling)


async def collect_all(generations: Sequence[Generation]) -> list[list[TokenEvent]]:
    """Run several to their ends together; when one fails or the client leaves, the others are aborted."""
    tasks = [asyncio.create_task(generation.collect()) for generation in generations]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
