"""PaliGemma 1 and 2: a Gemma behind a SigLIP tower; image and prompt see each other in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.errors import ModelError
from penstock.models.config import DecoderConfig, VisionConfig, WeightMap
from penstock.models.families.gemma import read_gemma, read_gemma2
from penstock.models.family import Family
from penstock.models.reader import ConfigReader, text_config

LANGUAGE = {"gemma": read_gemma, "gemma2": read_gemma2}
TEXT = {
    "vocab_size": 257152,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
}
IMAGE_TOKEN = 256000


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of the language model from the config.json of the whole."""
    text = {"tie_word_embeddings": True} | (text_config(raw) if raw.get("text_config") else TEXT)
    kind = text.get("model_type", "gemma")
    if kind not in LANGUAGE:
        raise ModelError(
            f"config.json: a language model of type {kind!r} behind a vision tower is not supported",
            f"supported: {', '.join(LANGUAGE)}",
        )
    return LANGUAGE[kind]({**text, "use_bidirectional_attention": None})  # see `sees`


def sees(raw: Mapping[str, Any]) -> VisionConfig:
    """How it takes images: one token repeated, before a prompt that is seen as a whole.

    Without images transformers does the same with a Gemma 1 and not with a Gemma 2, and so do we.
    """
    c, text = ConfigReader(raw), text_config(raw)
    token = c.integer("image_token_index", c.integer("image_token_id", IMAGE_TOKEN))
    both = text.get("model_type", "gemma") == "gemma" and text.get("use_bidirectional_attention") is not False
    return VisionConfig(token, whole=True, whole_text=both)


FAMILIES = {"paligemma": Family("PaliGemma 1 and 2", read, sees)}
