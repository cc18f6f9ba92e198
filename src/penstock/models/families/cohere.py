"""Command-R (cohere) and Command-R7B, Command-A (cohere2): parallel residual with one norm, neighbouring rotation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.kernels.rotary import NO_ROTATION
from penstock.models.config import DecoderConfig, HeadNormConfig, NormConfig, WeightMap
from penstock.models.family import Family
from penstock.models.reader import ConfigReader

COHERE = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "logit_scale": 0.0625,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
}
COHERE2 = COHERE | {"rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_pattern": 4}
WEIGHTS = WeightMap(mlp_norm=None)


def read_cohere(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Cohere decoder from its config.json."""
    c = ConfigReader(raw, COHERE)
    norm = NormConfig("layer", c.number("layer_norm_eps"))
    return _cohere("cohere", c, qk_norm=HeadNormConfig(norm, over="each") if c.flag("use_qk_norm") else None), WEIGHTS


def read_cohere2(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Cohere 2 decoder from its config.json: only layers with a window are rotated."""
    c = ConfigReader(raw, COHERE2)
    every, layers = c.integer("sliding_window_pattern"), c.integer("num_hidden_layers")
    windows = c.windows(c.maybe_integer("sliding_window"), [bool((i + 1) % every) for i in range(layers)])
    config = _cohere("cohere2", c, windows=windows)
    ropes = tuple(NO_ROTATION if window is None else config.rope for window in windows)
    return replace(config, layer_ropes=ropes), WEIGHTS


def _cohere(family: str, c: ConfigReader, **given: Any) -> DecoderConfig:
    head_dim = c.integer("head_dim", c.integer("hidden_size") // c.integer("num_attention_heads"))
    biased = c.flag("attention_bias")
    return c.decoder(
        family,
        head_dim=head_dim,
        norm=NormConfig("layer", c.number("layer_norm_eps")),
        rope=replace(c.rope(head_dim), neighbours=True),
        parallel=True,
        qkv_bias=biased,
        out_bias=biased,
        logit_multiplier=c.number("logit_scale"),
        **given,
    )


FAMILIES = {
    "cohere": Family("Command-R, Command-R+, Aya", read_cohere),
    "cohere2": Family("Command-R7B, Command-A", read_cohere2),
}
