"""SmolLM3: Llama with every fourth layer not rotated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.kernels.rotary import NO_ROTATION
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.families.llama import llama_like
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 2e6,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a SmolLM3 decoder from its config.json."""
    c = ConfigReader(raw, DEFAULTS)
    rotated = rotated_layers(c)
    named = c.per_layer("layer_types") is not None  # layers that are named as sliding slide, whatever the flag says
    size = c.maybe_integer("sliding_window") if named or c.flag("use_sliding_window") else None
    config = llama_like("smollm3", c, windows=c.windows(size, [not turns for turns in rotated]))
    return replace(config, layer_ropes=tuple(config.rope if turns else NO_ROTATION for turns in rotated)), WeightMap()


def rotated_layers(c: ConfigReader) -> list[bool]:
    """Which layers are rotated: those with a 1 in `no_rope_layers`, or all but every n-th."""
    every = c.integer("no_rope_layer_interval")
    flags = c.per_layer("no_rope_layers") if c.raw.get("no_rope_layers") else None
    if flags is None:
        return [bool((i + 1) % every) for i in range(c.integer("num_hidden_layers"))]
    return [bool(flag) for flag in flags]


FAMILIES = {"smollm3": Family("SmolLM3", read)}
