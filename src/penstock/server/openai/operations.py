"""The OpenAI and Anthropic routes' part of the table of operations."""

from __future__ import annotations

from typing import Any

from penstock.server.anthropic.wire import CountRequest, Message, MessageEvent, MessagesRequest
from penstock.server.openai.answers import ChatChunk, ChatCompletion, TextChunk, TextCompletion
from penstock.server.openai.embeddings import EmbeddingList, EmbeddingRequest
from penstock.server.openai.models import Model
from penstock.server.openai.responses_wire import Response, ResponseEvent, ResponsesRequest
from penstock.server.openai.tokens import Detokenize, TokenizerInfo
from penstock.server.openai.wire import ChatRequest, CompletionRequest
from penstock.server.operations import Operation

_TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}

OPENAI = (
    Operation("get", "/v1/models", "The model", "openai", dict[str, str | list[Model]]),
    Operation("get", "/v1/models/{model}", "The model, by its name", "openai", Model),
    Operation(
        "post", "/v1/chat/completions", "Answers to a conversation", "openai", ChatCompletion,
        bodies=(ChatRequest,), event=ChatChunk, example=_TALK,
    ),
    Operation(
        "post", "/v1/completions", "Answers to prompts", "openai", TextCompletion,
        bodies=(CompletionRequest,), event=TextChunk, example={"prompt": "Once upon a time", "max_tokens": 4},
    ),
    Operation(
        "post", "/v1/embeddings", "Vectors of texts", "openai", EmbeddingList,
        bodies=(EmbeddingRequest,), example={"input": "Once upon a time"},
    ),
    Operation(
        "post", "/v1/responses", "An answer in the form of OpenAI's Responses", "openai", Response,
        bodies=(ResponsesRequest,), event=ResponseEvent, example={"input": "Hello", "max_output_tokens": 4},
    ),
    Operation(
        "post", "/v1/messages", "An answer in the form of Anthropic's Messages", "anthropic", Message,
        bodies=(MessagesRequest,), event=MessageEvent, example=_TALK,
    ),
    Operation(
        "post", "/v1/messages/count_tokens", "The tokens of a conversation", "anthropic", dict[str, int],
        bodies=(CountRequest,), example={"messages": _TALK["messages"]},
    ),
    Operation(
        "post", "/detokenize", "The text of token ids", "openai", dict[str, str],
        bodies=(Detokenize,), example={"tokens": [1, 2, 3]},
    ),
    Operation("get", "/tokenizer_info", "The tokenizer's settings", "openai", TokenizerInfo),
)  # fmt: skip
