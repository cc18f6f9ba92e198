"""BLOOM and BLOOMZ: ALiBi, a norm behind the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.kernels.rotary import NO_ROTATION
from penstock.models.config import DecoderConfig, NormConfig, WeightMap
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

DEFAULTS = {
    "vocab_size": 250880,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 2048,  # that it was trained with; ALiBi has no end
    "tie_word_embeddings": True,
}
ALIASES = {
    "n_embed": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "seq_length": "max_position_embeddings",
}
WEIGHTS = WeightMap(
    base="transformer.",
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    final_norm="ln_f",
    layer="h.{i}.",
    qkv=("self_attention.query_key_value",),
    qkv_grouped=True,
    out="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a BLOOM decoder from its config.json."""
    c = ConfigReader(raw, DEFAULTS, ALIASES)
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    config = c.decoder(
        "bloom",
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=4 * hidden,
        norm=NormConfig("layer", c.number("layer_norm_epsilon"), bias=True),
        rope=NO_ROTATION,
        alibi="exact",
        residual_normed=c.flag("apply_residual_connection_post_layernorm"),
        qkv_bias=True,
        out_bias=True,
        gated=False,
        mlp_bias=True,
        activation="gelu_pytorch_tanh",
    )
    return config, WEIGHTS


FAMILIES = {"bloom": Family("BLOOM, BLOOMZ", read)}
