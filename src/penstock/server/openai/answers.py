"""What chat and text completions answer, whole and as events of a stream."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType


class PromptDetails(msgspec.Struct):
    """How many prompt tokens came from the prefix cache."""

    cached_tokens: int


class CompletionDetails(msgspec.Struct):
    """How many completion tokens were reasoning."""

    reasoning_tokens: int


class Usage(msgspec.Struct):
    """Token counts. completion_tokens_details: of chats."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails | UnsetType = UNSET


class TokenLogprob(msgspec.Struct):
    """A token by itself. bytes: of its text, also where they are only a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """A generated token with the likeliest at its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(msgspec.Struct):
    """`logprobs` of a chat choice."""

    content: list[ChosenLogprob]


class CalledFunction(msgspec.Struct):
    """In a stream the name comes once, the arguments in pieces."""

    name: str | UnsetType
    arguments: str


class CalledTool(msgspec.Struct, kw_only=True):
    """A call. index: its place among those of the answer; given in streams only."""

    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CalledFunction


class AnswerMessage(msgspec.Struct, kw_only=True):
    """The assistant's words; in a stream, some of them. content is null beside tool calls only."""

    role: Literal["assistant"] | UnsetType = "assistant"
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CalledTool] | UnsetType = UNSET


class Choice(msgspec.Struct, kw_only=True):
    """A whole answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The body of whole answers."""

    object: Literal["chat.completion"] = "chat.completion"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class ChunkChoice(msgspec.Struct, kw_only=True):
    """A piece of an answer."""

    index: int
    delta: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(msgspec.Struct, kw_only=True):
    """An event of a stream."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class TextLogprobs(msgspec.Struct):
    """`logprobs` of a text completion, a list each for all tokens. text_offset: characters before each token.

    The first token of a prompt has no log-probability: null, and null for the alternatives.
    """

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class TextChoice(msgspec.Struct, kw_only=True):
    """An answer of a text completion, or a piece of one."""

    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class TextCompletion(msgspec.Struct, kw_only=True):
    """The body of whole text completions."""

    object: Literal["text_completion"] = "text_completion"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class TextChunk(msgspec.Struct, kw_only=True):
    """An event of a stream, its fields in TGI's order. usage: null before the chunk that has it, absent without one."""

    object: Literal["text_completion"] = "text_completion"
    id: str
    created: int
    choices: list[TextChoice]
    model: str
    system_fingerprint: str
    usage: Usage | UnsetType | None = UNSET
