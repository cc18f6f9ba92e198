"""The typed messages between a front end and the engine: what is asked, what comes back.

Every front end (native routes, OpenAI routes, batch, chat) only translates into `EngineRequest`; the limits are
checked once, by `validate`, where the sequences live. The structs travel as msgpack over a socket pair.
"""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from typing import Literal

import msgspec

from penstock.errors import InvalidRequest
from penstock.plan.work import Work

Pooling = Literal["mean", "last", "first", "none"]
FinishReason = Literal["length", "eos_token", "stop_sequence", "aborted", "error"]

MAX_TOP_TOKENS = 128  # alternatives per position that one request may ask for
MAX_PROMPT_TOP = 2**20  # alternatives for a whole prompt
MAX_LOGIT_BIAS = 1024  # entries
MAX_STOP_IDS = 256
MAX_GRAMMAR = 2**20  # characters
MAX_IMAGES = 256  # of one request
MAX_IMAGE_BYTES = 192 * 2**20  # of all its images, prepared; a frame of the wire is larger
MAX_COPIES = 8  # of the numbers in one
IMAGE_ARRAYS = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")
_ITEM = {"float32": 4, "int64": 8, "bool": 1}
_PENALTIES = ("frequency_penalty", "count_penalty", "presence_penalty")


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How the next token is chosen. The defaults are greedy decoding.

    top_k 0, top_p 1, typical_p 1 and min_p 0 are off. `seed` names the random stream: the draw at a position depends on
    (seed, position) alone, never on the other requests in the batch. frequency_penalty is TGI's, relative to the length
    of prompt and output; count_penalty and presence_penalty are OpenAI's frequency_penalty and presence_penalty, over
    the output alone. logit_bias: added to the raw scores of these ids.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    count_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_p: float = 0.0
    logit_bias: dict[int, float] = {}
    watermark: bool = False
    seed: int = 0

    @property
    def draws(self) -> bool:
        """Whether the token is drawn at random rather than the likeliest."""
        return self.do_sample or self.temperature != 1.0 or self.top_k > 0 or self.top_p < 1.0 or self.typical_p < 1.0

    @property
    def plain(self) -> bool:
        """Whether the raw scores decide alone (no processor changes them)."""
        return not (self.draws or self.penalizes or self.logit_bias or self.min_p > 0.0 or self.watermark)

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there before score differently."""
        return self.repetition_penalty != 1.0 or any(
            (self.frequency_penalty, self.count_penalty, self.presence_penalty)
        )


class Grammar(msgspec.Struct, frozen=True):
    """What the output must match, in llguidance's serialized form; made by text/grammar, and tried out in the forge
    (engine/forge) where its author is a stranger."""

    source: str


class Embed(msgspec.Struct, frozen=True):
    """Which hidden states of a prompt are wanted, numbered as transformers does.

    layers: 0 is what goes into the first layer, i what comes out of the i-th, the last of them behind the final norm;
    negative numbers count from the end. pooling: over the prompt's tokens; none is every token's own.
    """

    layers: tuple[int, ...] = (-1,)
    pooling: Pooling = "mean"

    def of(self, num_layers: int) -> tuple[int, ...]:
        """The layers of a model with so many, negative numbers resolved."""
        return tuple(i + num_layers + 1 if i < 0 else i for i in self.layers)


class Array(msgspec.Struct, frozen=True, array_like=True):
    """Numbers as they lie in memory. copies: each `stretch` of numbers stands in `data` once and in the array so often
    in a row (a picture is a film of two equal frames to Qwen2-VL)."""

    dtype: Literal["float32", "int64", "bool"]
    shape: list[int]
    data: bytes
    copies: int = 1
    stretch: int = 1


class Image(msgspec.Struct, frozen=True, weakref=True):
    """An image, prepared for the tower of a model.

    tokens: the rows of the prompt that it fills. digest: SHA-256 over the arrays. arrays: what transformers' image
    processor made of it, by its names (IMAGE_ARRAYS).
    """

    tokens: int
    digest: bytes
    arrays: dict[str, Array]


class EngineRequest(msgspec.Struct, frozen=True, omit_defaults=True, tag="generate"):
    """One sequence to generate. `id` is chosen by the sender and unique among its live requests.

    max_new_tokens may be 0 where only the prompt's log-probabilities or its embedding are wanted; the one output then
    has no tokens and finishes with "length".
    """

    id: int
    prompt_ids: list[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    ignore_eos: bool = False
    logprobs: bool = False  # log-probability of each chosen token
    top_n_tokens: int = 0  # so many alternatives per generated token
    prompt_logprobs: bool = False  # log-probability of every prompt token (recomputes the whole prompt)
    prompt_top_n: int = 0  # so many alternatives per prompt token; needs prompt_logprobs
    min_new_tokens: int = 0  # no end of sequence (eos or stop_ids) before so many tokens
    stop_ids: list[int] = []  # end the sequence as eos does, also under ignore_eos
    grammar: Grammar | None = None
    embed: Embed | None = None
    images: list[Image] = []  # fill the placeholder tokens of the prompt, in their order
    priority: int = 0  # lower runs first
    deterministic: bool = False  # bit-identical in any batch: its steps are its own, and so are its cached blocks
    adapter: str | None = None  # the LoRA adapter that the model computes with, by its name
    salt: bytes = b""  # prefix cache is shared only between requests of equal salt (one per API key)

    @property
    def reads_prompt(self) -> bool:
        """Whether every prompt token's hidden state is needed, and not only its keys and values."""
        return self.prompt_logprobs or self.embed is not None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget a request: its blocks return at the next step, nothing more is sent for it."""

    id: int


class LoadAdapter(msgspec.Struct, frozen=True, omit_defaults=True, tag="load_adapter"):
    """Load a LoRA adapter under a name, from a folder. replace: in the place of one that has the name."""

    id: int
    name: str
    folder: str
    replace: bool = False


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload_adapter"):
    """Forget an adapter. Requests that run on it finish with it; its memory returns with the last of them."""

    id: int
    name: str


class AdapterReply(msgspec.Struct, frozen=True, omit_defaults=True, tag="adapter"):
    """How a LoadAdapter or an UnloadAdapter went; failure: None where it went well."""

    id: int
    failure: Failed | None = None


class Token(msgspec.Struct, frozen=True, array_like=True):
    """One generated token. `top` are (id, logprob) of the likeliest alternatives, best first."""

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


class SequenceOutput(msgspec.Struct, omit_defaults=True):
    """What one step made for one request.

    `finish` is set on the last output of a request. The first output carries the prompt's share: log-probabilities
    (the first is None: nothing precedes it), how many tokens came from the prefix cache, and the seconds in the queue.
    `error` is our own text for a client; it never holds a traceback.

    embedding: float32 as it lies in memory, [layers, tokens, hidden], tokens being 1 where they are pooled. Where they
    are not, each output has those of the next positions, and several may come before the first token.
    """

    id: int
    tokens: list[Token] = []
    finish: FinishReason | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top: list[list[tuple[int, float]]] | None = None  # as Token.top; empty for the first
    embedding: bytes | None = None
    cached_tokens: int = 0
    queue_seconds: float | None = None
    error: str | None = None
    invalid: bool = False  # the error is the request's own fault (422 rather than 424)


class Totals(msgspec.Struct, omit_defaults=True):
    """What all steps together took and did. The seconds are of the model's arithmetic in steps with prompt tokens and
    in those without, and of everything else in a step: scheduling, sampling. The peaks are of single steps."""

    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    other_seconds: float = 0.0
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    flops: float = 0.0
    peak_bytes_per_second: float = 0.0
    peak_flops_per_second: float = 0.0

    def count(self, work: Work, model_seconds: float, prompts: bool) -> None:
        """Add one step."""
        if prompts:
            self.prompt_seconds += model_seconds
        else:
            self.decode_seconds += model_seconds
        self.weight_bytes += work.weight_bytes
        self.kv_bytes += work.kv_bytes
        self.flops += work.flops
        if model_seconds > 0:
            self.peak_bytes_per_second = max(self.peak_bytes_per_second, work.bytes / model_seconds)
            self.peak_flops_per_second = max(self.peak_flops_per_second, work.flops / model_seconds)

    @property
    def work(self) -> Work:
        return Work(self.weight_bytes, self.kv_bytes, self.flops)


class EngineStats(msgspec.Struct, omit_defaults=True):
    """Counters and gauges of the engine, sent with each step."""

    running: int = 0
    waiting: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    used_blocks: int = 0
    total_blocks: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    step_seconds: float = 0.0  # of the last step; and so are the rest
    forward_seconds: float = 0.0  # the model's part of it
    model_seconds: float = 0.0  # forward_seconds and the output matrix
    step_prompts: int = 0  # sequences that computed tokens of their prompts
    step_decodes: int = 0  # sequences that only computed their latest token
    totals: Totals = msgspec.field(default_factory=Totals)


class StepOutput(msgspec.Struct, tag="step"):
    """Everything that one step made, all sequences in one message."""

    outputs: list[SequenceOutput]
    stats: EngineStats


class Stage(msgspec.Struct, frozen=True, tag="stage"):
    """One finished stage of start-up, for people: what it did and the seconds it took."""

    name: str
    text: str
    seconds: float


class Limits(msgspec.Struct, frozen=True):
    """What the loaded model and its memory allow; fixed once the engine is ready."""

    max_input_tokens: int
    max_total_tokens: int
    vocab_size: int  # width of the output; token ids are below it
    eos_ids: list[int]
    block_size: int
    num_blocks: int
    max_batch_prefill_tokens: int
    max_batch_size: int
    dtype: str
    num_layers: int = 0  # hidden states are numbered from 0 to this
    hidden_size: int = 0  # numbers in each
    device: str = "cpu"  # as torch names it
    weight_size: float = 2.0  # bytes of one weight of a matrix as it is stored
    image_token: int | None = None  # stands in a prompt for each row of an image; None: the model takes no images
    start_id: int | None = None  # what the decoder begins with, where an encoder reads the prompt
    hidden_states: bool = True  # they can be asked for

    def continued(self, prompt_ids: list[int]) -> list[int]:
        """The tokens that the text of an answer continues: none where an encoder reads the prompt."""
        return prompt_ids if self.start_id is None else []


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine can take requests."""

    limits: Limits


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine could not start, or gives up; the parts of a PenstockError."""

    exit_code: int
    what: str
    why: str = ""
    hint: str = ""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """The engine process is alive, though it may be busy with a long step."""


ToEngine = EngineRequest | Abort | LoadAdapter | UnloadAdapter
FromEngine = StepOutput | Stage | Ready | Failed | Beat | AdapterReply


def validate(request: EngineRequest, limits: Limits) -> None:
    """Check a request against everything the engine relies on.

    Raises InvalidRequest with the text for the client. The wording of the token limits is TGI's, which clients match.
    """
    s = request.sampling
    for name in ("temperature", "top_p", "typical_p", "repetition_penalty", *_PENALTIES, "min_p"):
        value = getattr(s, name)
        if not -1.8e308 < value < 1.8e308:  # false for NaN too, and fine with integers of any size
            raise InvalidRequest(f"`{name}` must be a finite number")
    if s.temperature <= 0:
        raise InvalidRequest("`temperature` must be strictly positive")
    if s.repetition_penalty <= 0:
        raise InvalidRequest("`repetition_penalty` must be strictly positive")
    for name in _PENALTIES:
        if not -2 <= getattr(s, name) <= 2:
            raise InvalidRequest(f"`{name}` must be >= -2.0 and <= 2.0")
    if not 0 < s.top_p <= 1:
        raise InvalidRequest("`top_p` must be > 0.0 and < 1.0")
    if not 0 < s.typical_p <= 1:
        raise InvalidRequest("`typical_p` must be > 0.0 and < 1.0")
    if not 0 <= s.top_k < 2**31:
        raise InvalidRequest("`top_k` must be strictly positive")
    if not 0 <= s.min_p <= 1:
        raise InvalidRequest("`min_p` must be >= 0.0 and <= 1.0")
    if not 0 <= s.seed < 2**64:
        raise InvalidRequest("`seed` must be >= 0 and < 2^64")
    if len(s.logit_bias) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"`logit_bias` must have at most {MAX_LOGIT_BIAS} entries. Given: {len(s.logit_bias)}")
    if not all(-100 <= bias <= 100 for bias in s.logit_bias.values()):  # false for NaN too
        raise InvalidRequest("`logit_bias` values must be >= -100 and <= 100")
    _inside("`logit_bias`: ", s.logit_bias, limits)
    _check_images(request, limits)
    _check_lengths(request, limits)


def _check_lengths(request: EngineRequest, limits: Limits) -> None:
    """The part of `validate` that is about tokens: how many of them, and which."""
    if request.max_new_tokens < 0 or (request.max_new_tokens == 0 and not request.reads_prompt):
        raise InvalidRequest("`max_new_tokens` must be strictly positive")
    if not 0 <= request.min_new_tokens <= request.max_new_tokens:
        raise InvalidRequest("`min_new_tokens` must be >= 0 and <= `max_new_tokens`")
    for name in ("top_n_tokens", "prompt_top_n"):
        if not 0 <= getattr(request, name) <= MAX_TOP_TOKENS:
            raise InvalidRequest(f"`{name}` must be >= 0 and <= {MAX_TOP_TOKENS}")
    if request.prompt_top_n > 0 and not request.prompt_logprobs:
        raise InvalidRequest("`prompt_top_n` needs `prompt_logprobs`")
    if request.embed is not None:
        if not limits.hidden_states:
            raise InvalidRequest("this model runs through transformers and gives no hidden states")
        layers = request.embed.of(limits.num_layers)
        if not 0 < len(layers) <= limits.num_layers + 1 or not all(0 <= i <= limits.num_layers for i in layers):
            raise InvalidRequest(f"`layers` must be numbers of the model's hidden states, 0 to {limits.num_layers}")
    if len(request.stop_ids) > MAX_STOP_IDS:
        raise InvalidRequest(f"`stop_ids` must have at most {MAX_STOP_IDS} entries. Given: {len(request.stop_ids)}")
    if request.grammar is not None and len(request.grammar.source) > MAX_GRAMMAR:
        raise InvalidRequest(f"`grammar` must be at most {MAX_GRAMMAR} characters long")
    if not -(2**31) <= request.priority < 2**31:
        raise InvalidRequest("`priority` must fit 32 bits")
    n = len(request.prompt_ids)
    if n == 0:
        raise InvalidRequest("`inputs` cannot be empty")
    if n + request.max_new_tokens > limits.max_total_tokens:
        raise InvalidRequest(
            f"`inputs` tokens + `max_new_tokens` must be <= {limits.max_total_tokens}. "
            f"Given: {n} `inputs` tokens and {request.max_new_tokens} `max_new_tokens`"
        )
    if n > limits.max_input_tokens:
        raise InvalidRequest(f"`inputs` must have less than {limits.max_input_tokens} tokens. Given: {n}")
    if n * request.prompt_top_n > MAX_PROMPT_TOP:
        raise InvalidRequest(f"`prompt_top_n` times the tokens of the prompt must be <= {MAX_PROMPT_TOP}")
    _inside("`stop_ids`: ", request.stop_ids, limits)
    _inside("", request.prompt_ids, limits)


def _check_images(request: EngineRequest, limits: Limits) -> None:
    """The part of `validate` that is about images: whether any can be, and whether the prompt has their places."""
    images = request.images
    if not images:
        return
    if limits.image_token is None:
        raise InvalidRequest("this model takes no images")
    if len(images) > MAX_IMAGES:
        raise InvalidRequest(f"a request may have at most {MAX_IMAGES} images. Given: {len(images)}")
    size = 0
    for image in images:
        if image.tokens < 1 or len(image.digest) != 32 or not set(image.arrays) <= set(IMAGE_ARRAYS):
            raise InvalidRequest("an image is not as an image processor makes it")
        for array in image.arrays.values():
            if len(array.shape) > 8 or min(array.shape, default=1) < 0:
                raise InvalidRequest("an image has arrays of an impossible shape")
            if (
                not 1 <= array.copies <= MAX_COPIES
                or array.stretch < 1
                or len(array.data) % (array.stretch * _ITEM[array.dtype])
            ):
                raise InvalidRequest("an image has arrays of an impossible shape")
            if prod(array.shape) * _ITEM[array.dtype] != len(array.data) * array.copies:
                raise InvalidRequest("an image has arrays that do not fill their shape")
            size += len(array.data)
    if size > MAX_IMAGE_BYTES:
        most = MAX_IMAGE_BYTES >> 20
        raise InvalidRequest(f"the images take {size >> 20} MiB once prepared, more than {most}: send smaller ones")
    places, tokens = request.prompt_ids.count(limits.image_token), sum(image.tokens for image in images)
    if places != tokens:
        raise InvalidRequest(f"the prompt has {places} places for rows of images, and its images have {tokens} rows")


def _inside(where: str, ids: Collection[int], limits: Limits) -> None:
    """Refuse ids that the model has no score for."""
    if not ids:
        return
    low, high = min(ids), max(ids)
    if low < 0 or high >= limits.vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequest(f"{where}token id {bad} is outside the vocabulary of {limits.vocab_size}")
