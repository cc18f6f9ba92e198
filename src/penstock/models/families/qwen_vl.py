"""Qwen2-VL and Qwen2.5-VL: a Qwen 2 whose rotary positions follow the height and width of images (M-RoPE)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.errors import ModelError
from penstock.models.config import DecoderConfig, VisionConfig, WeightMap
from penstock.models.families.qwen import read_qwen2
from penstock.models.family import Family
from penstock.models.reader import ConfigReader, text_config

TEXT = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_window_layers": 80,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
IMAGE_TOKEN = 151655
SECTIONS = [16, 24, 24]


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of the language model; older files have its keys beside those of the whole."""
    text = {**TEXT, **(text_config(raw) if raw.get("text_config") else raw)}
    block = dict(text.get("rope_scaling") or text.get("rope_parameters") or {})
    sections = tuple(block.get("mrope_section") or SECTIONS)
    if block.get("rope_type", block.get("type")) == "mrope":
        block["rope_type"] = "default"
    config, names = read_qwen2(text | {"rope_parameters": block, "rope_scaling": None})
    if len(sections) != 3 or not all(isinstance(n, int) and n > 0 for n in sections):
        raise ModelError("config.json: `mrope_section` must be three numbers of pairs")
    if sum(sections) != config.head_dim // 2:
        raise ModelError(
            f"config.json: `mrope_section` has {sum(sections)} pairs, a head {config.head_dim // 2}",
            "every pair turns by one of an image's places",
        )
    return replace(config, rope=replace(config.rope, sections=sections)), names


def sees(raw: Mapping[str, Any]) -> VisionConfig:
    """How it takes images: a token for each square of patches."""
    vision = raw.get("vision_config") or {}
    if not isinstance(vision, dict):
        raise ModelError("config.json: `vision_config` must be an object")
    token = ConfigReader(raw).integer("image_token_id", IMAGE_TOKEN)
    return VisionConfig(token, merge=ConfigReader(vision).integer("spatial_merge_size", 2))


FAMILIES = {
    "qwen2_vl": Family("Qwen2-VL, QVQ", read, sees),
    "qwen2_5_vl": Family("Qwen2.5-VL", read, sees),
}
