"""Llama 1, 2, 3.x and everything that calls itself model_type `llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.models.config import DecoderConfig, NormConfig, WeightMap
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


def read(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Llama decoder from its config.json."""
    return llama_like("llama", ConfigReader(raw, DEFAULTS)), WeightMap()


def llama_like(family: str, c: ConfigReader, **given: Any) -> DecoderConfig:
    """A decoder of Llama's shape; `given` are the fields in which a family differs."""
    biased = c.flag("attention_bias")
    fields = {
        "norm": NormConfig(eps=c.number("rms_norm_eps")),
        "qkv_bias": biased,
        "out_bias": biased,
        "mlp_bias": c.flag("mlp_bias"),
    }
    return c.decoder(family, **fields | given)


FAMILIES = {
    "llama": Family("Llama 1, 2, 3.x; Yi, SmolLM 1 and 2, Falcon 3, DeepSeek LLM and others of its shape", read)
}
