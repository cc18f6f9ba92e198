"""What requests of the OpenAI family look like: the fields they share, messages, chat and text completions."""

from __future__ import annotations

from typing import Any

import msgspec


class StreamOptions(msgspec.Struct):
    """`stream_options`. continuous_usage_stats: every chunk tells the token counts so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Sampled(msgspec.Struct, kw_only=True):
    """The fields that say how to generate; chat and text completions share them.

    The first block is OpenAI's, the second is of other servers whose clients send these.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None

    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    deterministic: bool | None = None
    grammar: Any = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None


class TextPart(msgspec.Struct, tag_field="type", tag="text"):
    """A part of a message's content."""

    text: str


class RefusalPart(msgspec.Struct, tag_field="type", tag="refusal"):
    """An earlier answer in which the model said no."""

    refusal: str


class ImagePart(msgspec.Struct, tag_field="type", tag="image_url"):
    """A picture, at a data URL or an address."""

    image_url: Any = None


class AudioPart(msgspec.Struct, tag_field="type", tag="input_audio"):
    """Sound; known so that it can be refused, like those below."""

    input_audio: Any = None


class VideoPart(msgspec.Struct, tag_field="type", tag="video_url"):
    """A film."""

    video_url: Any = None


class FilePart(msgspec.Struct, tag_field="type", tag="file"):
    """A document."""

    file: Any = None


Part = TextPart | RefusalPart | ImagePart | AudioPart | VideoPart | FilePart


def plain(parts: list[Part]) -> str | list[Part]:
    """Parts as a message's content: one string where all of them are text."""
    texts = [part.text for part in parts if isinstance(part, TextPart)]
    return "".join(texts) if len(texts) == len(parts) else parts


class FunctionCall(msgspec.Struct):
    """A call that the assistant made. arguments: JSON text as OpenAI has it, or the object itself."""

    name: str
    arguments: Any = None
    parameters: Any = None  # what TGI also calls the arguments


class ToolCall(msgspec.Struct, kw_only=True):
    """One entry of a message's `tool_calls`."""

    function: FunctionCall
    id: str | None = None
    type: str = "function"


class ChatMessage(msgspec.Struct, kw_only=True):
    """A message of the conversation. reasoning_content: what the assistant thought before it answered."""

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatRequest(Sampled, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    tool_prompt: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None


class CompletionRequest(Sampled, kw_only=True):
    """Body of /v1/completions. prompt: a text, several, the ids of one, or the ids of several."""

    prompt: str | list[Any]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
