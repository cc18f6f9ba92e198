"""What an encoder-decoder is: its arithmetic as data, read from a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.errors import ModelError, UsageError
from penstock.hub.config import read_config, read_settings
from penstock.kernels.norms import ACTIVATIONS
from penstock.models.reader import ConfigReader, refuse_quantized


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Everything that decides the arithmetic of a T5. Norms are RMS norms before each part, products have no biases.

    trained_positions: length of the texts it was trained on; positions are relative, so that longer ones have no
    border. buckets, max_distance: of the bias on scores; bias_in_each_layer: instead of one for all layers of a stack.
    scaled_head: what the output matrix multiplies is divided by the root of its size. start_id: what the decoder begins
    with.
    """

    family: str
    vocab_size: int
    hidden_size: int
    encoder_layers: int
    decoder_layers: int
    num_heads: int
    head_dim: int
    intermediate_size: int
    activation: str
    gated: bool
    norm_eps: float
    buckets: int
    max_distance: int
    bias_in_each_layer: bool
    scaled_head: bool
    trained_positions: int
    start_id: int
    eos_ids: tuple[int, ...] = ()
    dtype: str | None = None

    @property
    def max_positions(self) -> int:
        """Tokens of prompt and answer together that are promised where nobody asks for more."""
        return 2 * self.trained_positions

    @property
    def inner_size(self) -> int:
        """All heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_elements(self) -> int:
        """Numbers that one token takes in the cache, over all layers of the decoder."""
        return 2 * self.decoder_layers * self.inner_size

    @property
    def kv_vectors(self) -> int:
        """How many vectors they are, one for each head."""
        return 2 * self.decoder_layers * self.num_heads


@dataclass(frozen=True)
class Kind:
    """A model_type. models: what people know of it. scaled_head: always, never, or as config.json says (None)."""

    models: str
    defaults: Mapping[str, Any]
    bias_in_each_layer: bool = False
    scaled_head: bool | None = None


_FARTHEST = 2**16  # tokens; T5's is 128
_T5 = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "n_positions": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_MT5 = _T5 | {
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}

ALIASES = {
    "hidden_size": "d_model",
    "head_dim": "d_kv",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}

KINDS = {
    "t5": Kind("T5, T5 v1.1 (gated GELU), flan-t5, flan-ul2", _T5),
    "mt5": Kind("mT5, mT0", _MT5, scaled_head=False),
    "umt5": Kind("UMT5", _MT5, bias_in_each_layer=True, scaled_head=True),
}


def encodes(folder: Path) -> bool:
    """Whether the model in a folder is one of these. Raises ModelError for a folder that is no model."""
    return read_config(folder).get("model_type") in KINDS


def read_encoder_decoder(
    folder: Path, rope_scaling: str | None = None, rope_factor: float | None = None
) -> EncoderDecoderConfig:
    """Read a snapshot's config.json and generation_config.json. Raises ModelError for what cannot be, UsageError for
    a rope scaling, which there is nothing to scale for."""
    if rope_scaling or rope_factor:
        raise UsageError("--rope-scaling is for models with rotary positions, which this one has not")
    return from_configs(read_config(folder), read_settings(folder, "generation_config.json"))


def from_configs(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> EncoderDecoderConfig:
    """The description that a config.json and a generation_config.json give. Raises ModelError."""
    refuse_quantized(raw)
    family = str(raw["model_type"])
    kind = KINDS[family]
    as_spelt = ConfigReader(raw, kind.defaults)  # the default of num_decoder_layers does not see the common name
    c = ConfigReader(raw, kind.defaults, ALIASES)
    projection = c.text("feed_forward_proj")
    gated, activation = projection.startswith("gated-"), projection.removeprefix("gated-")
    if projection == "gated-gelu":
        activation = "gelu_new"
    if activation not in ACTIVATIONS:
        raise ModelError(f"unsupported activation {activation!r}", f"supported: {', '.join(ACTIVATIONS)}")
    layers, buckets = c.integer("num_layers"), c.integer("relative_attention_num_buckets")
    max_distance = c.integer("relative_attention_max_distance")
    if buckets < 4 or not buckets // 2 < max_distance <= _FARTHEST:
        raise ModelError(f"config.json: {buckets} buckets do not fit distances of up to {max_distance}")
    return EncoderDecoderConfig(
        family=family,
        vocab_size=c.integer("vocab_size"),
        hidden_size=c.integer("d_model"),
        encoder_layers=layers,
        decoder_layers=c.integer("num_decoder_layers", as_spelt.integer("num_layers")),
        num_heads=c.integer("num_heads"),
        head_dim=c.integer("d_kv"),
        intermediate_size=c.integer("d_ff"),
        activation=activation,
        gated=gated,
        norm_eps=c.positive("layer_norm_epsilon"),
        buckets=buckets,
        max_distance=max_distance,
        bias_in_each_layer=kind.bias_in_each_layer,
        scaled_head=_scaled(c) if kind.scaled_head is None else kind.scaled_head,
        trained_positions=c.integer("n_positions"),
        start_id=_start_id(c, generation),
        eos_ids=_ids(generation.get("eos_token_id")) or _ids(c.raw.get("eos_token_id")),
        dtype=c.raw.get("dtype") or c.raw.get("torch_dtype"),
    )


def _scaled(c: ConfigReader) -> bool:
    """T5 scales what its tied head multiplies, v1.1 has a head of its own and does not. transformers 5 says so in a
    key of its own, because it writes all of them as tied."""
    return c.flag("scale_decoder_outputs", c.flag("tie_word_embeddings", True))


def _start_id(c: ConfigReader, generation: Mapping[str, Any]) -> int:
    """The token that the decoder begins with; where nobody says, T5's, which is the padding."""
    for value in (generation.get("decoder_start_token_id"), c.raw.get("decoder_start_token_id")):
        if isinstance(value, int) and 0 <= value < c.integer("vocab_size"):
            return value
    return next(iter(_ids(c.raw.get("pad_token_id"))), 0)


def _ids(value: object) -> tuple[int, ...]:
    """Token ids from one or a list of them; what is none is left out."""
    return tuple(i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))
