"""The text decoder of Llama 4: experts, chunks of attention in the rotated layers, a temperature in the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.errors import ModelError
from penstock.kernels.rotary import NO_ROTATION
from penstock.models.config import DecoderConfig, ExpertsConfig, HeadNormConfig, NormConfig, WeightMap
from penstock.models.families.llama import llama_like
from penstock.models.families.smollm3 import rotated_layers
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

DEFAULTS = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}
WEIGHTS = WeightMap(
    gate="feed_forward.gate_proj",
    up="feed_forward.up_proj",
    down="feed_forward.down_proj",
    router="feed_forward.router",
    experts_gate_up="feed_forward.experts.gate_up_proj",
    experts_down="feed_forward.experts.down_proj",
    experts_transposed=True,
    shared_gate="feed_forward.shared_expert.gate_proj",
    shared_up="feed_forward.shared_expert.up_proj",
    shared_down="feed_forward.shared_expert.down_proj",
)


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Llama 4 text decoder from its config.json."""
    c = ConfigReader(raw, DEFAULTS)
    layers, wide, eps = c.integer("num_hidden_layers"), c.integer("intermediate_size"), c.number("rms_norm_eps")
    step, sparse = c.integer("interleave_moe_layer_step"), c.raw.get("moe_layers")
    if sparse is not None and not isinstance(sparse, list):
        raise ModelError("config.json: `moe_layers` must be a list of layers")
    rotated, kinds, size = rotated_layers(c), c.per_layer("layer_types"), c.maybe_integer("attention_chunk_size")
    chunked = rotated if kinds is None else [kind == "chunked_attention" for kind in kinds]
    config = llama_like(
        "llama4_text",
        c,
        intermediate_size=c.integer("intermediate_size_mlp"),
        rope=replace(c.rope(c.integer("head_dim")), neighbours=True),
        chunks=tuple(size if chunk else None for chunk in chunked),
        temperature=(c.positive("floor_scale"), c.number("attn_scale")) if c.flag("attn_temperature_tuning") else None,
        mlp_bias=False,
        experts=ExpertsConfig(
            layers=tuple((i + 1) % step == 0 if sparse is None else i in sparse for i in range(layers)),
            count=c.integer("num_local_experts"),
            top_k=c.integer("num_experts_per_tok"),
            intermediate_size=wide,
            scoring="sigmoid",
            weighs_input=True,
            shared_size=wide,
        ),
    )
    rope, qk_norm = config.rope, None
    if c.flag("use_qk_norm"):
        # theirs comes behind the rotation: the same, since turning changes no length, but for a factor that it undoes
        qk_norm = HeadNormConfig(NormConfig(eps=eps, weight=False), rotated_only=True)
        rope = replace(rope, attention_factor=1.0)
    ropes = tuple(rope if turns else NO_ROTATION for turns in rotated)
    return replace(config, rope=rope, layer_ropes=ropes, qk_norm=qk_norm), WEIGHTS


FAMILIES = {"llama4_text": Family("Llama 4, text only", read)}
