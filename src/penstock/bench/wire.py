"""What servers are asked, and how their events are counted: TGI's /generate_stream and OpenAI's two routes.

Tokens are counted, not chunks: a server may send several tokens in one chunk, or hold some back. TGI sends one event
a token and the sum at the end; OpenAI's routes tell their usage, with each chunk where the server can. What a server
never tells is counted in chunks, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec


class _Token(msgspec.Struct):
    id: int = 0


class _Details(msgspec.Struct):
    generated_tokens: int = 0
    input_length: int | None = None


class _NativeEvent(msgspec.Struct):
    token: _Token | None = None
    details: _Details | None = None
    error: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_native = msgspec.json.Decoder(_NativeEvent)
_chunk = msgspec.json.Decoder(_Chunk)


class Tally:
    """The tokens of one answer, as they come.

    times: when, and how many tokens (or chunks) there were then, one entry a moment. running: the server tells the
    number with each chunk; total: it told the number at the end. Without either, chunks are all there is.
    """

    __slots__ = ("chunks", "error", "prompt_tokens", "running", "times", "total")

    def __init__(self) -> None:
        self.chunks = 0
        self.running = False
        self.total: int | None = None
        self.prompt_tokens: int | None = None
        self.error: str | None = None
        self.times: list[tuple[float, int]] = []

    @property
    def seen(self) -> int:
        """Tokens or chunks that have come."""
        return self.times[-1][1] if self.times else 0

    @property
    def tokens(self) -> int:
        """Tokens of the answer, as well as they are known."""
        return self.seen if self.total is None else self.total

    @property
    def told(self) -> bool:
        """Whether the server said how many tokens there are."""
        return self.running or self.total is not None

    def came(self, now: float, tokens: int) -> None:
        """There are so many tokens now."""
        if tokens <= self.seen:
            return
        if self.times and self.times[-1][0] == now:
            self.times[-1] = now, tokens
        else:
            self.times.append((now, tokens))

    def gaps(self) -> list[tuple[float, int]]:
        """Seconds between tokens and how many tokens that was so for; those that came together share their time.

        Where only the end told the number of tokens, the chunks share them evenly.
        """
        each = 1.0 if self.running or not self.total or not self.seen else self.total / self.seen
        pairs = zip(self.times, self.times[1:], strict=False)
        return [((b - a) / ((m - n) * each), max(1, round((m - n) * each))) for (a, n), (b, m) in pairs]


@dataclass(frozen=True)
class Api:
    """One way to ask. body: (model, prompt, new tokens, ignore the end of sequence) to a request; read: an event's data
    into the tally."""

    name: str
    path: str
    body: Callable[[str, str, int, bool], dict[str, Any]]
    read: Callable[[bytes, float, Tally], None]

    def request(self, model: str, prompt: str, new_tokens: int, ignore_eos: bool) -> bytes:
        return msgspec.json.encode(self.body(model, prompt, new_tokens, ignore_eos))


def _native_body(model: str, prompt: str, new_tokens: int, ignore_eos: bool) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": new_tokens, "details": True}}


def _read_native(data: bytes, now: float, tally: Tally) -> None:
    event = _native.decode(data)
    if event.error is not None:
        tally.error = event.error
    if event.token is not None:
        tally.running = True
        tally.came(now, tally.seen + 1)
    if event.details is not None:
        tally.total = event.details.generated_tokens
        tally.prompt_tokens = event.details.input_length


def _openai(model: str, new_tokens: int, ignore_eos: bool) -> dict[str, Any]:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": model, "max_tokens": new_tokens, "stream": True, "stream_options": options, "temperature": 0}
    return {**body, "ignore_eos": True} if ignore_eos else body


def _completions_body(model: str, prompt: str, new_tokens: int, ignore_eos: bool) -> dict[str, Any]:
    return {**_openai(model, new_tokens, ignore_eos), "prompt": prompt}


def _chat_body(model: str, prompt: str, new_tokens: int, ignore_eos: bool) -> dict[str, Any]:
    return {**_openai(model, new_tokens, ignore_eos), "messages": [{"role": "user", "content": prompt}]}


def _read_openai(data: bytes, now: float, tally: Tally) -> None:
    if data.strip() == b"[DONE]":
        return
    chunk = _chunk.decode(data)
    if chunk.error:
        tally.error = str(chunk.error)[:300]
    if chunk.usage is not None:
        tally.prompt_tokens = chunk.usage.prompt_tokens or tally.prompt_tokens
        if chunk.choices:
            tally.running = True
            tally.came(now, chunk.usage.completion_tokens)
        else:
            tally.total = chunk.usage.completion_tokens
    if not tally.running and any(_says_something(choice) for choice in chunk.choices):
        tally.chunks += 1
        tally.came(now, tally.chunks)


def _says_something(choice: _Choice) -> bool:
    delta = choice.delta
    if delta is None:
        return bool(choice.text)
    return bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)


APIS = {
    api.name: api
    for api in (
        Api("tgi", "/generate_stream", _native_body, _read_native),
        Api("completions", "/v1/completions", _completions_body, _read_openai),
        Api("chat", "/v1/chat/completions", _chat_body, _read_openai),
    )
}
