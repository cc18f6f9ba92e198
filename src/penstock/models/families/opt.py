"""OPT and Galactica: learned positions from row 2 on; the 350M model has its norms behind the sums and a narrower
embedding."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.kernels.rotary import NO_ROTATION
from penstock.models.config import DecoderConfig, NormConfig, WeightMap
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

DEFAULTS = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
WEIGHTS = WeightMap(
    base="model.decoder.",
    positions="embed_positions",
    final_norm="final_layer_norm",
    attention_norm="self_attn_layer_norm",
    mlp_norm="final_layer_norm",
    out="self_attn.out_proj",
    up="fc1",
    down="fc2",
)


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of an OPT decoder from its config.json."""
    c = ConfigReader(raw, DEFAULTS)
    biased, affine = c.flag("enable_bias"), c.flag("layer_norm_elementwise_affine")
    hidden, heads, before = c.integer("hidden_size"), c.integer("num_attention_heads"), c.flag("do_layer_norm_before")
    narrow = c.integer("word_embed_proj_dim", hidden) != hidden
    config = c.decoder(
        "opt",
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=c.integer("ffn_dim"),
        norm=NormConfig("layer", 1e-5, weight=affine, bias=affine),
        rope=NO_ROTATION,
        embedding_size=c.integer("word_embed_proj_dim") if narrow else None,
        positions_offset=2,
        qkv_bias=biased,
        out_bias=biased,
        gated=False,
        mlp_bias=biased,
        activation=c.text("activation_function"),
    )
    names = WEIGHTS
    if not before:
        sums = {"attention_sum_norm": names.attention_norm, "mlp_sum_norm": names.mlp_norm}
        names = replace(names, attention_norm=None, mlp_norm=None, **sums)
    if not before or c.flag("_remove_final_layer_norm"):
        names = replace(names, final_norm=None)
    return config, replace(names, project_in="project_in", project_out="project_out") if narrow else names


FAMILIES = {"opt": Family("OPT, Galactica", read)}
