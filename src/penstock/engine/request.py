"""What is asked of the engine: one sequence, and how its tokens are chosen.

Every front end (native routes, OpenAI routes, batch, chat) only translates into `EngineRequest`; it is held against the
limits once, in engine/limits, where the sequences live.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Pooling = Literal["mean", "last", "first", "none"]

IMAGE_ARRAYS = ("pixel_values", "pixel_attention_mask", "image_sizes", "image_grid_thw")


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
