"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.models.config import ConfigReader, DecoderConfig
from penstock.models.families import llama


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The description of a Mistral decoder from its config.json."""
    c = ConfigReader(raw)
    window = c.integer("sliding_window") if raw.get("sliding_window") else None
    config = llama.read_config({"num_key_value_heads": 8, **raw})
    return replace(config, family="mistral", windows=(window,) * config.num_layers)
