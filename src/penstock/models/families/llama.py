"""Llama 1, 2, 3.x and everything that calls itself model_type `llama`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.models.config import ConfigReader, DecoderConfig


def read_config(raw: Mapping[str, Any]) -> DecoderConfig:
    """The description of a Llama decoder from its config.json."""
    c = ConfigReader(raw)
    hidden, heads = c.integer("hidden_size"), c.integer("num_attention_heads")
    layers = c.integer("num_hidden_layers")
    positions = c.integer("max_position_embeddings", 2048)
    return DecoderConfig(
        family="llama",
        vocab_size=c.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=c.integer("num_key_value_heads", heads),
        head_dim=c.integer("head_dim", hidden // heads),
        intermediate_size=c.integer("intermediate_size"),
        max_positions=c.scaled_positions(positions),
        norm_eps=c.number("rms_norm_eps", 1e-6),
        activation=c.text("hidden_act", "silu"),
        rope=c.rope(positions),
        windows=(None,) * layers,
        tie_head=c.flag("tie_word_embeddings"),
        dtype=raw.get("dtype") or raw.get("torch_dtype"),
        qkv_bias=c.flag("attention_bias"),
        out_bias=c.flag("attention_bias"),
        mlp_bias=c.flag("mlp_bias"),
    )
