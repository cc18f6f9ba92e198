"""The native (TGI) API's JSON, in and out. Field order is what clients see."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

# TGI's integers. msgspec has no bounds above 63 bits; body.parse refuses what is longer.
I32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
U32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
U64 = Annotated[int, Meta(ge=0)]


class JsonGrammar(msgspec.Struct, tag_field="type", tag="json"):
    """The output is an object that fits a JSON schema, which is given as it is or as text."""

    value: Any


class JsonObjectGrammar(JsonGrammar, tag_field="type", tag="json_object"):
    """Another name of `json`."""


class RegexGrammar(msgspec.Struct, tag_field="type", tag="regex"):
    """The output matches a regular expression, whole."""

    value: str


class NamedSchema(msgspec.Struct):
    """A JSON schema with a name, which nobody looks at."""

    schema: Any
    name: str | None = None


class JsonSchemaGrammar(msgspec.Struct, tag_field="type", tag="json_schema"):
    """As `json`, in a wrapping."""

    value: NamedSchema


Grammar = JsonGrammar | JsonObjectGrammar | RegexGrammar | JsonSchemaGrammar


class GenerateParameters(msgspec.Struct, kw_only=True):
    """`parameters` of a request; the defaults are those of a field that is absent.

    None where null is allowed.
    """

    best_of: U64 | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: I32 | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: U32 | None = None
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: U64 | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: U64 | None = None
    top_n_tokens: U32 | None = None
    grammar: Grammar | None = None
    adapter_id: str | None = None
    deterministic: bool = False  # ours: the same bits in any batch


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


class VertexInstance(msgspec.Struct, kw_only=True):
    """An instance of /vertex that is a prompt."""

    inputs: str
    parameters: GenerateParameters | None = None


class VertexResponse(msgspec.Struct):
    """The answer of /vertex: a text for every instance."""

    predictions: list[str]


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


class ChatTokens(msgspec.Struct):
    """The answer of /chat_tokenize."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class ErrorResponse(msgspec.Struct):
    """TGI's JSON of an error."""

    error: str
    error_type: str


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
    adapters: list[str] | UnsetType = UNSET  # that `adapter_id` may name, where there are any; TGI does not tell
