"""Idefics3 and SmolVLM: a Llama behind a SigLIP tower, an image in pieces with their places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.errors import ModelError
from penstock.models.config import DecoderConfig, VisionConfig, WeightMap
from penstock.models.families.llama import read as read_llama
from penstock.models.family import Family
from penstock.models.reader import ConfigReader, text_config

TEXT = {"rms_norm_eps": 1e-5}  # where config.json says nothing of it
IMAGE_TOKEN = 128257


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of the language model from the config.json of the whole."""
    text = text_config(raw) if raw.get("text_config") else TEXT
    kind = text.get("model_type", "llama")
    if kind != "llama":
        raise ModelError(f"config.json: a language model of type {kind!r} is not what Idefics3 has", "it has a llama")
    return read_llama(text)


def sees(raw: Mapping[str, Any]) -> VisionConfig:
    """How it takes images: a token for each row of each piece."""
    return VisionConfig(ConfigReader(raw).integer("image_token_id", IMAGE_TOKEN))


FAMILIES = {
    "idefics3": Family("Idefics3", read, sees),
    "smolvlm": Family("SmolVLM 1 and 2", read, sees),
}
