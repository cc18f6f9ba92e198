"""What the loaded model allows, and whether a request keeps to it."""

from __future__ import annotations

from collections.abc import Collection
from math import prod

import msgspec

from penstock.engine.request import IMAGE_ARRAYS, EngineRequest
from penstock.errors import InvalidRequest

MAX_TOP_TOKENS = 128  # alternatives per position that one request may ask for
MAX_PROMPT_TOP = 2**20  # alternatives for a whole prompt
MAX_LOGIT_BIAS = 1024  # entries
MAX_STOP_IDS = 256
MAX_GRAMMAR = 2**20  # characters
MAX_IMAGES = 256  # of one request
MAX_IMAGE_BYTES = 192 * 2**20  # of all its images, prepared; a frame of the wire is larger
MAX_COPIES = 8  # of the numbers in one
_ITEM = {"float32": 4, "int64": 8, "bool": 1}
_PENALTIES = ("frequency_penalty", "count_penalty", "presence_penalty")


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
