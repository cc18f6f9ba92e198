"""The JSON of /v1/chat/completions, in and out."""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    """A part of a message's content."""

    text: str


class ChatMessage(msgspec.Struct):
    """A message. Anything but text is refused by name later."""

    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[Any] | None = None


class StreamOptions(msgspec.Struct):
    """`stream_options`."""

    include_usage: bool = False


class ChatRequest(msgspec.Struct, kw_only=True):
    """Body of /v1/chat/completions.

    The fields after `stream_options` are known so that they can be refused.
    """

    messages: list[ChatMessage]
    model: str | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: Any = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    min_p: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    structured_outputs: Any = None
    modalities: list[str] | None = None
    prediction: Any = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[Any] | None = None


class PromptDetails(msgspec.Struct):
    """How many prompt tokens came from the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class AnswerMessage(msgspec.Struct):
    """The assistant's words; in a stream, some of them."""

    role: Literal["assistant"]
    content: str


class Choice(msgspec.Struct, kw_only=True):
    """A whole answer."""

    index: int = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: str


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The body of a whole answer."""

    object: Literal["chat.completion"] = "chat.completion"
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class ChunkChoice(msgspec.Struct, kw_only=True):
    """A piece of an answer."""

    index: int = 0
    delta: AnswerMessage
    logprobs: None = None
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
