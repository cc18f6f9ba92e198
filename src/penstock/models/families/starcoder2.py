"""StarCoder2: Llama's attention with biases, layer norms, a plain MLP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.models.config import DecoderConfig, NormConfig, WeightMap
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "tie_word_embeddings": True,
}


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a StarCoder2 decoder from its config.json."""
    c = ConfigReader(raw, DEFAULTS)
    biased = c.flag("use_bias")
    config = c.decoder(
        "starcoder2",
        norm=NormConfig("layer", c.number("norm_epsilon"), bias=True),
        windows=(c.maybe_integer("sliding_window"),) * c.integer("num_hidden_layers"),
        qkv_bias=biased,
        out_bias=biased,
        gated=False,
        mlp_bias=biased,
    )
    return config, WeightMap(up="mlp.c_fc", down="mlp.c_proj")


FAMILIES = {"starcoder2": Family("StarCoder2", read)}
