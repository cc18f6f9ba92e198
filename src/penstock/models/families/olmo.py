"""OLMo 1 (norms without weights), OLMo 2 (norms behind each part and on q and k), OLMoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.models.config import DecoderConfig, ExpertsConfig, HeadNormConfig, NormConfig, WeightMap
from penstock.models.families.llama import DEFAULTS, llama_like
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

OLMO = DEFAULTS | {"vocab_size": 50304}
OLMO2 = OLMO | {"rms_norm_eps": 1e-5}
OLMOE = OLMO2 | {
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 8,
    "num_experts": 64,
}


def read_olmo(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of an OLMo 1 decoder from its config.json."""
    c = ConfigReader(raw, OLMO)
    norm, clip = NormConfig("layer", 1e-5, weight=False), c.maybe_number("clip_qkv")
    return llama_like("olmo", c, norm=norm, qkv_clip=clip, mlp_bias=False), WeightMap()


def read_olmo2(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of an OLMo 2 decoder from its config.json."""
    c = ConfigReader(raw, OLMO2)
    names = WeightMap(
        attention_norm=None,
        attention_out_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_out_norm="post_feedforward_layernorm",
    )
    return llama_like("olmo2", c, qk_norm=_norm_of_all(c), mlp_bias=False), names


def read_olmoe(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of an OLMoE decoder from its config.json."""
    c = ConfigReader(raw, OLMOE, {"num_local_experts": "num_experts"})
    experts = ExpertsConfig(
        layers=(True,) * c.integer("num_hidden_layers"),
        count=c.integer("num_experts"),
        top_k=c.integer("num_experts_per_tok"),
        intermediate_size=c.integer("intermediate_size"),
        normalized=c.flag("norm_topk_prob"),
    )
    clip = c.maybe_number("clip_qkv")
    given = {"qk_norm": _norm_of_all(c), "qkv_clip": clip, "mlp_bias": False}
    return llama_like("olmoe", c, experts=experts, **given), WeightMap()


def _norm_of_all(c: ConfigReader) -> HeadNormConfig:
    return HeadNormConfig(NormConfig(eps=c.number("rms_norm_eps")), over="all")


FAMILIES = {
    "olmo": Family("OLMo 1", read_olmo),
    "olmo2": Family("OLMo 2", read_olmo2),
    "olmoe": Family("OLMoE", read_olmoe),
}
