"""Falcon: 7B (one kv head, parallel residual), 40B and 180B (kv groups, two norms), RW (ALiBi)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.kernels.rotary import NO_ROTATION
from penstock.models.config import DecoderConfig, NormConfig, WeightMap
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

DEFAULTS = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "parallel_attn": True,
    "max_position_embeddings": 2048,
    "activation": "gelu",
    "tie_word_embeddings": True,
}
ALIASES = {
    "n_embed": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
}
WEIGHTS = WeightMap(
    base="transformer.",
    embedding="word_embeddings",
    final_norm="ln_f",
    layer="h.{i}.",
    qkv=("self_attention.query_key_value",),
    qkv_grouped=True,
    out="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Falcon decoder from its config.json."""
    c = ConfigReader(raw, DEFAULTS, ALIASES)
    heads, biased, alibi = c.integer("num_attention_heads"), c.flag("bias"), c.flag("alibi")
    head_dim = c.integer("hidden_size") // heads
    new = c.flag("new_decoder_architecture")
    parallel = new or c.flag("parallel_attn")
    kv_heads = c.integer("num_kv_heads", heads) if new else 1 if c.flag("multi_query") else heads
    config = c.decoder(
        "falcon",
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=c.integer("ffn_hidden_size", 4 * c.integer("hidden_size")),
        norm=NormConfig("layer", c.number("layer_norm_epsilon"), bias=True),
        rope=NO_ROTATION if alibi else c.rope(head_dim),
        alibi="half" if alibi else None,
        parallel=parallel,
        qkv_bias=biased,
        out_bias=biased,
        gated=False,
        mlp_bias=biased,
        activation=c.text("activation"),
    )
    if new and c.integer("num_ln_in_parallel_attn", 2) == 2:
        return config, replace(WEIGHTS, attention_norm="ln_attn", mlp_norm="ln_mlp")
    return config, replace(WEIGHTS, mlp_norm=None) if parallel else WEIGHTS


FAMILIES = {"falcon": Family("Falcon 7B, 40B, 180B, RW-1B", read)}
