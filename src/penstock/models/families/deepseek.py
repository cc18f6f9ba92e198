"""DeepSeek-V2, V2-Lite and V3: latent attention, fine experts with shared ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.models.config import DecoderConfig, ExpertsConfig, LatentConfig, NormConfig, WeightMap
from penstock.models.families.llama import llama_like
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

V2 = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "moe_intermediate_size": 1407,
    "num_experts_per_tok": 6,
}
V3 = V2 | {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "max_position_embeddings": 4096,
    "rope_interleave": True,
}
ALIASES = {"num_experts": "n_routed_experts", "num_local_experts": "n_routed_experts"}
WEIGHTS = WeightMap(
    shared_gate="mlp.shared_experts.gate_proj",
    shared_up="mlp.shared_experts.up_proj",
    shared_down="mlp.shared_experts.down_proj",
)


def read_v2(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a DeepSeek-V2 decoder from its config.json."""
    c = ConfigReader(raw, V2, ALIASES)
    grouped = c.text("topk_method") == "group_limited_greedy"
    return _deepseek("deepseek_v2", c, neighbours=True, grouped=grouped), WEIGHTS


def read_v3(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a DeepSeek-V3 decoder from its config.json."""
    c = ConfigReader(raw, V3, ALIASES)
    normalized = c.flag("norm_topk_prob")
    return _deepseek(
        "deepseek_v3", c, neighbours=c.flag("rope_interleave"), scoring="sigmoid", normalized=normalized
    ), WEIGHTS


def _deepseek(family: str, c: ConfigReader, neighbours: bool, grouped: bool = True, **routing: Any) -> DecoderConfig:
    heads, layers = c.integer("num_attention_heads"), c.integer("num_hidden_layers")
    turned, dense = c.integer("qk_rope_head_dim"), int(c.number("first_k_dense_replace"))
    head_dim = turned + c.integer("qk_nope_head_dim")
    rope = replace(c.rope(turned), rotary_dim=-turned, neighbours=neighbours)
    scale = head_dim**-0.5
    if rope.kind != "default" and rope.mscale_all_dim and rope.factor > 1:  # a longer context, a flatter softmax
        scale *= (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2
    size, biased = c.integer("moe_intermediate_size"), c.flag("attention_bias")
    experts = ExpertsConfig(
        layers=tuple(i >= dense for i in range(layers)),
        count=c.integer("n_routed_experts"),
        top_k=c.integer("num_experts_per_tok"),
        intermediate_size=size,
        scale=c.number("routed_scaling_factor"),
        groups=c.integer("n_group", 1) if grouped else 1,
        top_groups=c.integer("topk_group", 1),
        shared_size=size * c.integer("n_shared_experts"),
        **routing,
    )
    latent = LatentConfig(
        kv_rank=c.integer("kv_lora_rank"),
        q_rank=c.maybe_integer("q_lora_rank"),
        rotary_dim=turned,
        value_dim=c.integer("v_head_dim"),
        norm=NormConfig(eps=1e-6),
    )
    return llama_like(
        family,
        c,
        num_kv_heads=heads,
        head_dim=head_dim,
        rope=rope,
        attention_scale=scale,
        latent=latent,
        experts=experts,
        qkv_bias=biased,
        out_bias=biased,
        mlp_bias=False,
    )


FAMILIES = {
    "deepseek_v2": Family("DeepSeek-V2, V2-Lite", read_v2),
    "deepseek_v3": Family("DeepSeek-V3, R1", read_v3),
}
