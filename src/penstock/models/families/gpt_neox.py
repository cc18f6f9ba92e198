"""GPT-NeoX and Pythia: parallel residual with two norms, partial rotation, q, k and v of each head together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.models.config import DecoderConfig, NormConfig, WeightMap
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "intermediate_size": 24576,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "use_parallel_residual": True,
    "attention_bias": True,
}
ALIASES = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
WEIGHTS = WeightMap(
    base="gpt_neox.",
    embedding="embed_in",
    final_norm="final_layer_norm",
    head="embed_out",
    qkv=("attention.query_key_value",),
    qkv_grouped=True,
    out="attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a GPT-NeoX decoder from its config.json."""
    c = ConfigReader(raw, DEFAULTS, ALIASES)
    heads, biased = c.integer("num_attention_heads"), c.flag("attention_bias")
    head_dim = c.integer("hidden_size") // heads
    config = c.decoder(
        "gpt_neox",
        num_kv_heads=heads,
        head_dim=head_dim,
        norm=NormConfig("layer", c.number("layer_norm_eps"), bias=True),
        rope=c.rope(head_dim, partial=0.25),
        parallel=c.flag("use_parallel_residual"),
        qkv_bias=biased,
        out_bias=biased,
        gated=False,
        mlp_bias=True,
    )
    return config, WEIGHTS


FAMILIES = {"gpt_neox": Family("GPT-NeoX 20B, Pythia, Dolly 2, RedPajama-INCITE", read)}
