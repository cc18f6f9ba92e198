"""LLaVA 1.5 and LLaVA-NeXT: a language model of another family behind a CLIP or SigLIP tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.errors import ModelError
from penstock.models.config import DecoderConfig, VisionConfig, WeightMap
from penstock.models.families.llama import read as read_llama
from penstock.models.families.mistral import read_mistral
from penstock.models.families.qwen import read_qwen2
from penstock.models.family import Family
from penstock.models.reader import ConfigReader, text_config

LANGUAGE = {"llama": read_llama, "mistral": read_mistral, "qwen2": read_qwen2}
IMAGE_TOKEN = 32000


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of the language model from the config.json of the whole."""
    text = text_config(raw)
    kind = text.get("model_type", "llama")
    if kind not in LANGUAGE:
        raise ModelError(
            f"config.json: a language model of type {kind!r} behind a vision tower is not supported",
            f"supported: {', '.join(LANGUAGE)}",
        )
    return LANGUAGE[kind](text)


def sees(raw: Mapping[str, Any]) -> VisionConfig:
    """How it takes images: one token repeated for each row of an image."""
    c = ConfigReader(raw)
    return VisionConfig(c.integer("image_token_index", c.integer("image_token_id", IMAGE_TOKEN)))


FAMILIES = {
    "llava": Family("LLaVA 1.5, BakLLaVA and others of its shape", read, sees),
    "llava_next": Family("LLaVA-NeXT (1.6)", read, sees),
}
