"""Phi 1, 1.5 and 2 (parallel residual, partial rotation); Phi 3, 3.5 and 4 (fused matrices, LongRoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.models.config import DecoderConfig, HeadNormConfig, NormConfig, WeightMap
from penstock.models.families.llama import llama_like
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

PHI = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
}
PHI3 = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
PHI_WEIGHTS = WeightMap(
    final_norm="final_layernorm",
    mlp_norm=None,
    out="self_attn.dense",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    up="mlp.fc1",
    down="mlp.fc2",
)


def read_phi(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Phi 1, 1.5 or 2 decoder from its config.json."""
    c = ConfigReader(raw, PHI)
    norm = NormConfig("layer", c.number("layer_norm_eps"), bias=True)
    head_dim = c.integer("head_dim", c.integer("hidden_size") // c.integer("num_attention_heads"))
    config = c.decoder(
        "phi",
        norm=norm,
        rope=c.rope(head_dim, partial=0.5),
        parallel=True,
        qk_norm=HeadNormConfig(norm) if c.flag("qk_layernorm") else None,
        qkv_bias=True,
        out_bias=True,
        gated=False,
        mlp_bias=True,
        head_bias=True,
    )
    return config, PHI_WEIGHTS


def read_phi3(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Phi 3 or 4 decoder from its config.json."""
    block = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if (block.get("rope_type") or block.get("type")) in ("su", "yarn"):  # older names of the same
        block["rope_type"] = "longrope"
    c = ConfigReader({**raw, "rope_parameters": block}, PHI3)
    head_dim = c.integer("head_dim", c.integer("hidden_size") // c.integer("num_attention_heads"))
    rope = replace(c.rope(head_dim, partial=1.0), restarts=True)
    windows = (c.maybe_integer("sliding_window"),) * c.integer("num_hidden_layers")
    config = llama_like("phi3", c, rope=rope, windows=windows, qkv_bias=False, out_bias=False, mlp_bias=False)
    return config, WeightMap(qkv=("self_attn.qkv_proj",), gate_up="mlp.gate_up_proj")


FAMILIES = {
    "phi": Family("Phi 1, 1.5, 2", read_phi),
    "phi3": Family("Phi 3, 3.5 (not MoE), 4, 4-mini", read_phi3),
}
