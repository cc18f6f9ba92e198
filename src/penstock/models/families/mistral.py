"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.models.config import ConfigReader, DecoderConfig
from penstock.models.families import llama


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The description of a Mistral decoder from its config.json."""
    # what an absent key means to the family; an explicit null is no window
    raw = {"sliding_window": 4096, "num_key_value_heads": 8, **raw}
    window = ConfigReader(raw).integer("sliding_window") if raw["sliding_window"] else None
    config = llama.read_config(raw)
    return replace(config, family="mistral", windows=(window,) * config.num_layers)
