"""The native (TGI) routes' part of the table of operations."""

from __future__ import annotations

from typing import Any

from penstock.server.native import wire
from penstock.server.openai.tokens import TokenizeChat, TokenizeText
from penstock.server.openai.wire import ChatRequest, CompletionRequest
from penstock.server.operations import EVENTS, HTML, Operation

_SHORT: dict[str, Any] = {"inputs": "Once upon a time", "parameters": {"max_new_tokens": 4}}
_STREAM = wire.StreamResponse

NATIVE = (
    Operation("get", "/", "Health, or the chat page for a browser", "status"),
    Operation("get", "/health", "Whether requests are taken", "status"),
    Operation("get", "/ping", "The same, for SageMaker", "status"),
    Operation("get", "/info", "The model and its limits", "status", wire.Info),
    Operation("get", "/metrics", "Prometheus's text", "status", str, "text/plain; version=0.0.4; charset=utf-8"),
    Operation("get", "/docs", "Leads to /docs/", "documents", redirects=True),
    Operation("get", "/docs/", "This document for people", "documents", str, HTML),
    Operation("get", "/openapi.json", "This document", "documents", dict[str, Any]),
    Operation("get", "/api-doc/openapi.json", "This document, at TGI's address", "documents", dict[str, Any]),
    Operation(
        "post", "/generate", "The whole answer to a prompt", "native", wire.GenerateResponse,
        bodies=(wire.GenerateRequest,), example=_SHORT,
    ),
    Operation(
        "post", "/generate_stream", "The answer to a prompt, token by token", "native", _STREAM, EVENTS,
        bodies=(wire.GenerateRequest,), example=_SHORT,
    ),
    Operation(
        "post", "/", "The whole answer in a list, or token by token", "native", list[wire.GenerateResponse],
        bodies=(wire.CompatGenerateRequest,), event=_STREAM, example=_SHORT,
    ),
    Operation(
        "post", "/invocations", "SageMaker: a native, chat or completion request", "native", Any,
        bodies=(wire.CompatGenerateRequest, ChatRequest, CompletionRequest), event=_STREAM, example=_SHORT,
    ),
    Operation(
        "post", "/vertex", "Vertex AI: a text for every instance", "native", wire.VertexResponse,
        bodies=(wire.VertexInstance, ChatRequest), many="instances",
        example={"instances": [_SHORT]},
    ),
    Operation(
        "post", "/tokenize", "The tokens of a prompt (TGI), of a text or of a conversation", "native", Any,
        bodies=(wire.GenerateRequest, TokenizeText, TokenizeChat), example={"inputs": "Once upon a time"},
    ),
    Operation(
        "post", "/chat_tokenize", "A conversation's prompt and its tokens", "native", wire.ChatTokens,
        bodies=(ChatRequest,), example={"messages": [{"role": "user", "content": "Hello"}]},
    ),
)  # fmt: skip
