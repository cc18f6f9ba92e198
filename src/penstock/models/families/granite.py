"""Granite 3 and its MoE: Llama with multipliers on embedding, attention, residual and output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.models.config import DecoderConfig, ExpertsConfig, WeightMap
from penstock.models.families.llama import DEFAULTS, llama_like
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

MOE = DEFAULTS | {"num_local_experts": 8, "num_experts_per_tok": 2}
MOE_WEIGHTS = WeightMap(
    router="block_sparse_moe.router.layer",
    experts_gate_up="block_sparse_moe.input_linear.weight",
    experts_down="block_sparse_moe.output_linear.weight",
    shared_gate_up="shared_mlp.input_linear",
    shared_down="shared_mlp.output_linear",
)


def read_granite(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Granite decoder from its config.json."""
    c = ConfigReader(raw, DEFAULTS)
    return llama_like("granite", c, **_multipliers(c)), WeightMap()


def read_granite_moe(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Granite MoE decoder, with or without a shared expert, from its config.json."""
    c = ConfigReader(raw, MOE)
    experts = ExpertsConfig(
        layers=(True,) * c.integer("num_hidden_layers"),
        count=c.integer("num_local_experts"),
        top_k=c.integer("num_experts_per_tok"),
        intermediate_size=c.integer("intermediate_size"),
        normalized=True,
        shared_size=c.maybe_integer("shared_intermediate_size") or 0,
    )
    family = str(raw.get("model_type"))
    return llama_like(family, c, experts=experts, mlp_bias=False, **_multipliers(c)), MOE_WEIGHTS


def _multipliers(c: ConfigReader) -> dict[str, float]:
    return {
        "embedding_multiplier": c.number("embedding_multiplier", 1.0),
        "attention_scale": c.number("attention_multiplier", 1.0),
        "residual_multiplier": c.number("residual_multiplier", 1.0),
        "logit_multiplier": 1.0 / c.positive("logits_scaling", 1.0),
    }


FAMILIES = {
    "granite": Family("Granite 3.x, 4 (dense, no Mamba)", read_granite),
    "granitemoe": Family("Granite 3.x MoE", read_granite_moe),
    "granitemoeshared": Family("Granite MoE with a shared expert", read_granite_moe),
}
