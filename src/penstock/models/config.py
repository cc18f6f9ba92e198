"""What a decoder is, read from a Hugging Face config.json by its family."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.errors import ModelError
from penstock.kernels.rotary import RopeConfig

_ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class DecoderConfig:
    """Everything that decides a decoder's arithmetic.

    windows: for each layer how many tokens back it sees, or None for all. max_positions: the longest context the
    position embedding serves. tie_head: the output matrix is the embedding.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int
    norm_eps: float
    activation: str
    rope: RopeConfig
    windows: tuple[int | None, ...]
    tie_head: bool
    dtype: str | None = None
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    eos_ids: tuple[int, ...] = ()

    @property
    def scale(self) -> float:
        """Factor on attention scores."""
        return 1.0 / math.sqrt(self.head_dim)


@dataclass(frozen=True)
class WeightMap:
    """Where a family's checkpoint keeps each canonical tensor; `{i}` is the layer.

    A canonical matrix may be made of several, stacked along the output axis in the order given.
    """

    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer: str = "model.layers.{i}."
    attention_norm: str = "input_layernorm.weight"
    mlp_norm: str = "post_attention_layernorm.weight"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    out: tuple[str, ...] = ("self_attn.o_proj",)
    q_norm: str = "self_attn.q_norm.weight"
    k_norm: str = "self_attn.k_norm.weight"
    gate: tuple[str, ...] = ("mlp.gate_proj",)
    up: tuple[str, ...] = ("mlp.up_proj",)
    down: tuple[str, ...] = ("mlp.down_proj",)


class ConfigReader:
    """Typed look-ups in a config.json, with errors that name the key."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise ModelError(f"config.json: `{key}` must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 < value < 1e30:
            raise ModelError(f"config.json: `{key}` must be a number, not {value!r}")
        return float(value)

    def positive(self, key: str, default: float) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise ModelError(f"config.json: `{key}` must be above zero, not {value!r}")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.raw.get(key)
        return default if value is None else bool(value)

    def text(self, key: str, default: str) -> str:
        return str(self.raw.get(key) or default)

    def rope(self, max_positions: int, default_theta: float = 10000.0) -> RopeConfig:
        """The rotary settings, in both spellings: rope_parameters, or rope_scaling beside rope_theta."""
        block = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(block, dict):
            raise ModelError("config.json: the rope settings must be an object")
        part = ConfigReader(block)
        kind = str(block.get("rope_type") or block.get("type") or "default")
        if kind not in _ROPE_KINDS:
            raise ModelError(
                f"config.json: rope scaling {kind!r} is not supported",
                f"supported: {', '.join(_ROPE_KINDS)}",
            )
        original = part.integer("original_max_position_embeddings", max_positions)
        if kind == "dynamic":  # its growth counts from the stated context, whatever else the file says
            original = max_positions
        stretched = max_positions / original if kind == "yarn" else 1.0
        return RopeConfig(
            theta=part.positive("rope_theta", self.positive("rope_theta", default_theta)),
            kind=kind,
            factor=part.positive("factor", stretched),
            original_max_positions=original,
            low_freq_factor=part.positive("low_freq_factor", 1.0),
            high_freq_factor=part.positive("high_freq_factor", 4.0),
            beta_fast=part.number("beta_fast", 32.0) or 32.0,
            beta_slow=part.number("beta_slow", 1.0) or 1.0,
            attention_factor=part.number("attention_factor", 0.0) or None,
            mscale=part.number("mscale", 0.0),
            mscale_all_dim=part.number("mscale_all_dim", 0.0),
            truncate=part.flag("truncate", True),
        )

    def scaled_positions(self, max_positions: int) -> int:
        """The longest context after scaling, where the scaling stretches what config.json states."""
        rope = self.rope(max_positions)
        if rope.kind in ("linear", "dynamic", "yarn"):
            return max(max_positions, int(rope.original_max_positions * rope.factor))
        return max_positions

    def windows(self, num_layers: int, size: int | None) -> tuple[int | None, ...]:
        """The sliding window of each layer, from `layer_types` where the config has them."""
        kinds = self.raw.get("layer_types")
        if kinds is None:
            return (size,) * num_layers
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise ModelError(f"config.json: `layer_types` must name {num_layers} layers")
        return tuple(size if kind == "sliding_attention" else None for kind in kinds)
