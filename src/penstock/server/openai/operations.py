"""The OpenAI and Anthropic routes' part of the table of operations."""

from __future__ import annotations

from typing import Any

from penstock.server.anthropic.wire import CountRequest, Message, MessageEvent, MessagesRequest
from penstock.server.openai.adapters import LoadAdapterRequest, UnloadAdapterRequest
from penstock.server.openai.answers import ChatChunk, ChatCompletion, TextChunk, TextCompletion
from penstock.server.openai.batch_wire import Batch, BatchList, BatchRequest, Deleted, FileList, FileObject, UploadForm
from penstock.server.openai.embeddings import EmbeddingList, EmbeddingRequest
from penstock.server.openai.models import Model
from penstock.server.openai.responses_wire import Response, ResponseEvent, ResponsesRequest
from penstock.server.openai.tokens import Detokenize, TokenizerInfo
from penstock.server.openai.wire import ChatRequest, CompletionRequest
from penstock.server.operations import BYTES, FORM, TEXT, Operation

_TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}

OPENAI = (
    Operation("get", "/v1/models", "The model and its adapters", "openai", dict[str, str | list[Model]]),
    Operation("get", "/v1/models/{model}", "The model or an adapter, by its name", "openai", Model),
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
        "get", "/v1/files", "The files of this key", "openai", FileList, query=("purpose", "limit", "after", "order")
    ),
    Operation("post", "/v1/files", "Store a file", "openai", FileObject, bodies=(UploadForm,), takes=FORM),
    Operation("get", "/v1/files/{file_id}", "What is known of a file", "openai", FileObject),
    Operation("delete", "/v1/files/{file_id}", "Delete a file", "openai", Deleted),
    Operation("get", "/v1/files/{file_id}/content", "The bytes of a file", "openai", str, content_type=BYTES),
    Operation("get", "/v1/batches", "The batches of this key", "openai", BatchList, query=("limit", "after")),
    Operation(
        "post", "/v1/batches", "Answer all requests of a file", "openai", Batch, bodies=(BatchRequest,),
        example={"input_file_id": "file-0", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    ),
    Operation("get", "/v1/batches/{batch_id}", "How far a batch is", "openai", Batch),
    Operation("post", "/v1/batches/{batch_id}/cancel", "Stop a batch; what is done stays", "openai", Batch),
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
    Operation(
        "post", "/v1/load_lora_adapter", "Load a LoRA adapter under a name", "openai", str, TEXT,
        bodies=(LoadAdapterRequest,),
    ),
    Operation(
        "post", "/v1/unload_lora_adapter", "Forget a LoRA adapter", "openai", str, TEXT,
        bodies=(UnloadAdapterRequest,),
    ),
)  # fmt: skip
