"""GPT-2 (matrices stored the other way round) and GPT-BigCode (one kv head): learned positions, plain MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.kernels.rotary import NO_ROTATION
from penstock.models.config import DecoderConfig, NormConfig, WeightMap
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

GPT2 = {
    "vocab_size": 50257,
    "max_position_embeddings": 1024,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}
BIGCODE = GPT2 | {"activation_function": "gelu_pytorch_tanh", "multi_query": True}
ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
}
WEIGHTS = WeightMap(
    base="transformer.",
    embedding="wte",
    positions="wpe",
    final_norm="ln_f",
    layer="h.{i}.",
    attention_norm="ln_1",
    mlp_norm="ln_2",
    qkv=("attn.c_attn",),
    out="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
)


def read_gpt2(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a GPT-2 decoder from its config.json."""
    c = ConfigReader(raw, GPT2, ALIASES)
    by_depth = c.flag("scale_attn_by_inverse_layer_idx")
    return _gpt2("gpt2", c, c.integer("num_attention_heads"), scale_by_depth=by_depth), replace(
        WEIGHTS, transposed=True
    )


def read_bigcode(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a GPT-BigCode decoder from its config.json."""
    c = ConfigReader(raw, BIGCODE, ALIASES)
    one = c.flag("multi_query")
    return _gpt2("gpt_bigcode", c, 1 if one else c.integer("num_attention_heads")), replace(
        WEIGHTS, qkv_grouped=not one
    )


def _gpt2(family: str, c: ConfigReader, kv_heads: int, **given: Any) -> DecoderConfig:
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    return c.decoder(
        family,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        intermediate_size=c.integer("n_inner", 4 * hidden),
        norm=NormConfig("layer", c.number("layer_norm_epsilon"), bias=True),
        rope=NO_ROTATION,
        positions_offset=0,
        attention_scale=None if c.flag("scale_attn_weights") else 1.0,
        qkv_bias=True,
        out_bias=True,
        gated=False,
        mlp_bias=True,
        activation=c.text("activation_function"),
        **given,
    )


FAMILIES = {
    "gpt2": Family("GPT-2, DistilGPT2", read_gpt2),
    "gpt_bigcode": Family("StarCoder, SantaCoder", read_bigcode),
}
