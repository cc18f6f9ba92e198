"""StableLM: partial rotation, layer norms, on request a parallel residual and norms of each head's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.models.config import DecoderConfig, HeadNormConfig, NormConfig, WeightMap
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

DEFAULTS = {
    "vocab_size": 50304,
    "intermediate_size": 6912,
    "hidden_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
}


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a StableLM decoder from its config.json."""
    c = ConfigReader(raw, DEFAULTS)
    eps, parallel = c.number("layer_norm_eps"), c.flag("use_parallel_residual")
    head_dim = c.integer("hidden_size") // c.integer("num_attention_heads")
    config = c.decoder(
        "stablelm",
        head_dim=head_dim,
        norm=NormConfig("layer", eps, bias=True),
        rope=c.rope(head_dim, partial=0.25),
        parallel=parallel,
        qk_norm=HeadNormConfig(NormConfig("layer", eps), over="each") if c.flag("qk_layernorm") else None,
        qkv_bias=c.flag("use_qkv_bias"),
    )
    names = WeightMap(q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm")
    return config, replace(names, mlp_norm=None) if parallel else names


FAMILIES = {"stablelm": Family("StableLM 3B, 2 1.6B, 2 12B", read)}
