"""Mistral: Llama with a sliding window. Mixtral: with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.models.config import DecoderConfig, ExpertsConfig, WeightMap
from penstock.models.families.llama import llama_like
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

MISTRAL = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,  # an explicit null is no window
}
MIXTRAL = MISTRAL | {
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "rope_theta": 1e6,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
}
EXPERTS = WeightMap(
    router="block_sparse_moe.gate",
    expert_gate="block_sparse_moe.experts.{e}.w1",
    expert_up="block_sparse_moe.experts.{e}.w3",
    expert_down="block_sparse_moe.experts.{e}.w2",
)


def read_mistral(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Mistral decoder from its config.json."""
    return _mistral("mistral", ConfigReader(raw, MISTRAL)), WeightMap()


def read_mixtral(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Mixtral decoder from its config.json."""
    c = ConfigReader(raw, MIXTRAL, {"num_experts": "num_local_experts"})
    experts = ExpertsConfig(
        layers=(True,) * c.integer("num_hidden_layers"),
        count=c.integer("num_local_experts"),
        top_k=c.integer("num_experts_per_tok"),
        intermediate_size=c.integer("intermediate_size"),
        normalized=True,
    )
    return _mistral("mixtral", c, experts=experts), EXPERTS


def _mistral(family: str, c: ConfigReader, **given: Any) -> DecoderConfig:
    windows = (c.maybe_integer("sliding_window"),) * c.integer("num_hidden_layers")
    return llama_like(family, c, windows=windows, qkv_bias=False, out_bias=False, mlp_bias=False, **given)


FAMILIES = {
    "mistral": Family("Mistral 7B, Nemo, Small; Zephyr, OpenHermes", read_mistral),
    "mixtral": Family("Mixtral 8x7B, 8x22B", read_mixtral),
}
