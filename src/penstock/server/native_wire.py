"""The native (TGI) API's JSON, in and out. Field order is what clients see."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType


class GenerateParameters(msgspec.Struct, kw_only=True):
    """`parameters` of a request; the defaults are those of a field that is absent.

    None where null is allowed.
    """

    best_of: int | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: int | None = None
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: int | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: int | None = None
    grammar: Any = None
    adapter_id: str | None = None


def _default_parameters() -> GenerateParameters:
    # TGI's quirk, which clients rely on: without `parameters` it samples, with `{}` it is greedy.
    return GenerateParameters(do_sample=True)


class GenerateRequest(msgspec.Struct, kw_only=True):
    """Body of /generate, /generate_stream and /tokenize."""

    inputs: str
    parameters: GenerateParameters = msgspec.field(default_factory=_default_parameters)


class CompatGenerateRequest(GenerateRequest, kw_only=True):
    """Body of POST /."""

    stream: bool = False


class PrefillToken(msgspec.Struct):
    """A prompt token; the first has no log-probability."""

    id: int
    text: str
    logprob: float | None


class Token(msgspec.Struct):
    """A generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class Sequence(msgspec.Struct, kw_only=True):
    """One of the other sequences of best_of."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    top_tokens: list[list[Token]] | UnsetType = UNSET


class Details(msgspec.Struct, kw_only=True):
    """`details` of a whole answer."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[Token]
    best_of_sequences: list[Sequence] | UnsetType = UNSET
    top_tokens: list[list[Token]] | UnsetType = UNSET


class GenerateResponse(msgspec.Struct, kw_only=True):
    """The answer of /generate."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(msgspec.Struct):
    """`details` of a stream's last event."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(msgspec.Struct, kw_only=True):
    """One event of a stream: one token."""

    index: int
    token: Token
    top_tokens: list[Token] | UnsetType = UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(msgspec.Struct):
    """A token of /tokenize; start and stop are byte offsets into the input."""

    id: int
    text: str
    start: int
    stop: int


class Info(msgspec.Struct):
    """GET /info."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
