"""Qwen 2, 2.5 (biases on q, k, v) and Qwen 3 (norms on q and k), and both with experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.errors import ModelError
from penstock.models.config import DecoderConfig, ExpertsConfig, HeadNormConfig, NormConfig, WeightMap
from penstock.models.families.llama import llama_like
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

QWEN2 = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN3 = QWEN2 | {"head_dim": 128}
QWEN2_MOE = QWEN2 | {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "qkv_bias": True,
}
QWEN3_MOE = QWEN2 | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "num_key_value_heads": 4,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_local_experts": 128,
}


def read_qwen2(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Qwen 2 or 2.5 decoder from its config.json."""
    c = ConfigReader(raw, QWEN2)
    windows = _late_windows(c)
    return llama_like("qwen2", c, windows=windows, qkv_bias=True, out_bias=False, mlp_bias=False), WeightMap()


def read_qwen3(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Qwen 3 decoder from its config.json."""
    c = ConfigReader(raw, QWEN3)
    return llama_like("qwen3", c, windows=_late_windows(c), qk_norm=_head_norm(c), mlp_bias=False), WeightMap()


def read_qwen2_moe(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Qwen 1.5 or 2 MoE decoder from its config.json."""
    c = ConfigReader(raw, QWEN2_MOE)
    full = c.integer("max_window_layers")
    windows = _windows(c, [i % 2 == 0 and i < full for i in range(c.integer("num_hidden_layers"))])
    experts = _experts(c, "num_experts", c.integer("shared_expert_intermediate_size"))
    given = {"qkv_bias": c.flag("qkv_bias"), "out_bias": False, "mlp_bias": False}
    return llama_like("qwen2_moe", c, windows=windows, experts=experts, **given), WeightMap()


def read_qwen3_moe(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Qwen 3 MoE decoder from its config.json."""
    c = ConfigReader(raw, QWEN3_MOE, {"num_experts": "num_local_experts"})
    windows = _windows(c, [True] * c.integer("num_hidden_layers"), by_type=False)
    experts = _experts(c, "num_local_experts", 0)
    given = {"windows": windows, "qk_norm": _head_norm(c), "mlp_bias": False}
    return llama_like("qwen3_moe", c, experts=experts, **given), WeightMap()


def _head_norm(c: ConfigReader) -> HeadNormConfig:
    return HeadNormConfig(NormConfig(eps=c.number("rms_norm_eps")))


def _experts(c: ConfigReader, count: str, shared_size: int) -> ExpertsConfig:
    """Every `decoder_sparse_step`-th layer has experts, but not those that `mlp_only_layers` names."""
    dense, step = c.raw.get("mlp_only_layers") or [], c.integer("decoder_sparse_step")
    if not isinstance(dense, list):
        raise ModelError("config.json: `mlp_only_layers` must be a list of layers")
    layers = range(c.integer("num_hidden_layers"))
    return ExpertsConfig(
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in layers),
        count=c.integer(count),
        top_k=c.integer("num_experts_per_tok"),
        intermediate_size=c.integer("moe_intermediate_size"),
        normalized=c.flag("norm_topk_prob"),
        shared_size=shared_size,
        shared_gate=shared_size > 0,
    )


def _late_windows(c: ConfigReader) -> tuple[int | None, ...]:
    """The first `max_window_layers` layers see everything, the others a window."""
    full = c.raw["max_window_layers"]
    return _windows(c, [i >= full for i in range(c.integer("num_hidden_layers"))])


def _windows(c: ConfigReader, sliding: list[bool], by_type: bool = True) -> tuple[int | None, ...]:
    """The window of each layer, where windows are used at all. by_type: `layer_types` counts before `sliding`."""
    size = c.maybe_integer("sliding_window") if c.flag("use_sliding_window") else None
    return c.windows(size, sliding) if by_type else tuple(size if slides else None for slides in sliding)


FAMILIES = {
    "qwen2": Family("Qwen 1.5, 2, 2.5, QwQ; DeepSeek-R1-Distill-Qwen", read_qwen2),
    "qwen3": Family("Qwen 3", read_qwen3),
    "qwen2_moe": Family("Qwen 1.5 and 2 MoE", read_qwen2_moe),
    "qwen3_moe": Family("Qwen 3 MoE (30B-A3B, 235B-A22B)", read_qwen3_moe),
}
