"""POST /v1/chat/completions: messages to text and tool calls, whole and as a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable

import msgspec
from msgspec import UNSET

from penstock import __version__
from penstock.server.body import parse
from penstock.server.exchange import DONE, Exchange
from penstock.server.generation import TokenEvent
from penstock.server.house import House
from penstock.server.native.answers import headers, stream_headers
from penstock.server.openai import answers as wire
from penstock.server.openai.fields import look_over
from penstock.server.openai.logprobs import of_chat
from penstock.server.openai.models import check_model
from penstock.server.openai.runs import Step
from penstock.server.openai.sampling import answers
from penstock.server.openai.turn import Turn, Voice, begin
from penstock.server.openai.wire import ChatRequest, StreamOptions
from penstock.text.answer import whole
from penstock.text.answer_events import CallArguments, CallStart, Content, Event, Reasoning

FINGERPRINT = f"{__version__}-native"
_MARK = "\0text"  # where a token's text goes in an encoded chunk


class Chat:
    """The route."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def completions(self, exchange: Exchange, raw: bytes) -> None:
        """Answers to a conversation."""
        arrived = time.monotonic()
        house = self._house
        body = parse(raw, ChatRequest)
        check_model(body.model, house)
        look_over(exchange, raw, ChatRequest, house.config.strict)
        house.metrics.requests.inc()
        with house.permits.take(answers(body, house)):
            turn = await begin(exchange, house, body, raw, arrived)
            if body.stream:
                await self._stream(exchange, turn, body)
            else:
                completion = await self._whole(turn)
                await exchange.answer_json(completion, headers(turn.runs.all[0], turn.prompt.text))

    async def _stream(self, exchange: Exchange, turn: Turn, body: ChatRequest) -> None:
        options = body.stream_options or StreamOptions()
        chunks = ChatChunks(self._house, turn, options.continuous_usage_stats, repeat_role=not _adds_up(exchange))
        async with turn.runs as runs:
            await exchange.start_events(stream_headers(turn.prompt.text))
            with exchange.kept_alive(self._house.config.keep_alive_seconds):
                async for step in runs:
                    data = chunks.of(step)
                    if data:
                        await exchange.write(data)
        if options.include_usage:
            await exchange.event(chunks.usage())
        await exchange.write(DONE)
        await exchange.end()

    async def _whole(self, turn: Turn) -> wire.ChatCompletion:
        tokens: list[list[TokenEvent]] = [[] for _ in turn.voices]
        events: list[list[Event]] = [[] for _ in turn.voices]
        async with turn.runs as runs:
            async for step in runs:
                for index, new in step:
                    tokens[index] += new
                    events[index] += turn.voices[index].read(new)
        choices = [self._choice(turn, voice, tokens[voice.index], events[voice.index]) for voice in turn.voices]
        return wire.ChatCompletion(
            id=f"chatcmpl-{secrets.token_hex(12)}",
            created=int(time.time()),
            model=self._house.model_name(turn.order.adapter),
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage(turn),
        )

    def _choice(self, turn: Turn, voice: Voice, tokens: list[TokenEvent], events: list[Event]) -> wire.Choice:
        said = whole(events)
        message = wire.AnswerMessage(content=said.content if said.calls else said.content or "")
        if said.reasoning:
            message.reasoning_content = said.reasoning
        if said.calls:
            message.tool_calls = [
                wire.CalledTool(id=c.id, type="function", function=wire.CalledFunction(c.name, c.arguments))
                for c in said.calls
            ]
        return wire.Choice(
            index=voice.index,
            message=message,
            logprobs=of_chat(self._house.tokenizer, tokens, turn.order.top_n) if turn.order.logprobs else None,
            finish_reason=voice.finish_reason or "stop",
        )


class ChatChunks:
    """The events of a stream.

    A chunk that is nothing but text differs from the one before it in the text alone, so the rest is encoded once.
    repeat_role: every delta tells the role, as TGI's do.
    """

    def __init__(self, house: House, turn: Turn, continuous_usage: bool, repeat_role: bool) -> None:
        self._house, self._turn, self._repeat_role = house, turn, repeat_role
        self._continuous_usage = continuous_usage
        self._identity = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._begun = [False] * len(turn.voices)
        self._plain = not continuous_usage and not turn.order.logprobs and turn.voices[0].parser is None
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # by index: what surrounds the text

    def of(self, step: Step) -> bytes:
        """The events of one step: a chunk a token, or what the tokens turned out to be."""
        out: list[bytes] = []
        encode = msgspec.json.encode
        for index, tokens in step:
            voice = self._turn.voices[index]
            if self._plain and self._begun[index] and not voice.generation.finish_reason:
                before, after = self._frames.get(index) or self._frame(index)
                out += [b"%b%b%b" % (before, encode(token.piece), after) for token in tokens]
            else:
                out += [b"data: %b\n\n" % encode(chunk) for chunk in self._chunks(voice, tokens)]
        return b"".join(out)

    def usage(self) -> wire.ChatChunk:
        """The last event, for those who asked."""
        chunk = self._chunk([])
        chunk.usage = usage(self._turn)
        return chunk

    def _chunks(self, voice: Voice, tokens: list[TokenEvent]) -> Iterable[wire.ChatChunk]:
        if voice.parser is None:
            choices = [self._choice(voice, wire.AnswerMessage(content=token.piece), [token]) for token in tokens]
        elif voice.ended:
            return []
        else:
            choices = [self._choice(voice, _delta(event), []) for event in voice.read(tokens)]
            if not choices and (voice.finish_reason or self._turn.order.logprobs):
                choices = [self._choice(voice, wire.AnswerMessage(), [])]
            if choices and self._turn.order.logprobs:
                choices[0].logprobs = of_chat(self._house.tokenizer, tokens, self._turn.order.top_n)
        if choices:
            choices[-1].finish_reason = voice.finish_reason
        return [self._chunk([choice]) for choice in choices]

    def _choice(self, voice: Voice, delta: wire.AnswerMessage, tokens: list[TokenEvent]) -> wire.ChunkChoice:
        if self._begun[voice.index] and not self._repeat_role:
            delta.role = UNSET
        self._begun[voice.index] = True
        choice = wire.ChunkChoice(index=voice.index, delta=delta)
        if tokens and self._turn.order.logprobs:
            choice.logprobs = of_chat(self._house.tokenizer, tokens, self._turn.order.top_n)
        return choice

    def _chunk(self, choices: list[wire.ChunkChoice]) -> wire.ChatChunk:
        return wire.ChatChunk(
            id=self._identity,
            created=self._created,
            model=self._house.model_name(self._turn.order.adapter),
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage(self._turn) if self._continuous_usage and choices else None,
        )

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        delta = wire.AnswerMessage(role="assistant" if self._repeat_role else UNSET, content=_MARK)
        encoded = msgspec.json.encode(self._chunk([wire.ChunkChoice(index=index, delta=delta)]))
        before, _, after = encoded.partition(msgspec.json.encode(_MARK))
        self._frames[index] = b"data: " + before, after + b"\n\n"
        return self._frames[index]


def usage(turn: Turn) -> wire.Usage:
    """Token counts; the prompt counts once however many answers it has."""
    prompt, completion = len(turn.prompt.ids), turn.completion_tokens
    details = wire.PromptDetails(turn.cached_tokens), wire.CompletionDetails(turn.reasoning_tokens)
    return wire.Usage(prompt, completion, prompt + completion, *details)


def _delta(event: Event) -> wire.AnswerMessage:
    match event:
        case Content(text):
            return wire.AnswerMessage(content=text)
        case Reasoning(text):
            return wire.AnswerMessage(reasoning_content=text)
        case CallStart(index, identity, name):
            function = wire.CalledFunction(name, "")
            call = wire.CalledTool(index=index, id=identity, type="function", function=function)
        case CallArguments(index, text):
            call = wire.CalledTool(index=index, function=wire.CalledFunction(UNSET, text))
    return wire.AnswerMessage(tool_calls=[call])


def _adds_up(exchange: Exchange) -> bool:
    """Whether the client is one of OpenAI's own libraries: they join the strings of all deltas, the role's too.

    Everybody else gets the role in every delta, as from TGI; its Python client cannot do without.
    """
    return exchange.header(b"x-stainless-lang") is not None
