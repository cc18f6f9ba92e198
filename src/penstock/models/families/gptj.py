"""GPT-J: parallel residual with one norm, rotation of neighbouring dimensions, a bias on the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.kernels.rotary import RopeConfig
from penstock.models.config import DecoderConfig, NormConfig, WeightMap
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

DEFAULTS = {
    "vocab_size": 50400,
    "max_position_embeddings": 2048,
    "hidden_size": 4096,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "rotary_dim": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
}
ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
WEIGHTS = WeightMap(
    base="transformer.",
    embedding="wte",
    final_norm="ln_f",
    layer="h.{i}.",
    attention_norm="ln_1",
    mlp_norm=None,
    qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    out="attn.out_proj",
    up="mlp.fc_in",
    down="mlp.fc_out",
)


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a GPT-J decoder from its config.json."""
    c = ConfigReader(raw, DEFAULTS, ALIASES)
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    config = c.decoder(
        "gptj",
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=c.integer("n_inner", 4 * hidden),
        norm=NormConfig("layer", c.number("layer_norm_epsilon"), bias=True),
        rope=RopeConfig(rotary_dim=c.integer("rotary_dim"), neighbours=True),
        parallel=True,
        gated=False,
        mlp_bias=True,
        head_bias=True,
        activation=c.text("activation_function"),
    )
    return config, WEIGHTS


FAMILIES = {"gptj": Family("GPT-J 6B", read)}
