"""Qwen 2, 2.5 (biases on q, k, v) and Qwen 3 (norms on q and k)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.models.config import ConfigReader, DecoderConfig
from penstock.models.families import llama


def read_qwen2(raw: Mapping[str, Any]) -> DecoderConfig:
    """The description of a Qwen 2 or 2.5 decoder from its config.json."""
    config = llama.read_config(raw)
    return replace(
        config,
        family="qwen2",
        windows=_windows(raw, config.num_layers),
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
    )


def read_qwen3(raw: Mapping[str, Any]) -> DecoderConfig:
    """The description of a Qwen 3 decoder from its config.json."""
    config = llama.read_config({**raw, "head_dim": raw.get("head_dim") or 128})
    return replace(config, family="qwen3", windows=_windows(raw, config.num_layers), qk_norm=True, mlp_bias=False)


def _windows(raw: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    """The first `max_window_layers` layers see everything, the others a window, where windows are used at all."""
    c = ConfigReader(raw)
    if not c.flag("use_sliding_window") or not raw.get("sliding_window"):
        return (None,) * layers
    size = c.integer("sliding_window")
    if raw.get("layer_types") is not None:
        return c.windows(layers, size)
    full = int(raw.get("max_window_layers", 28))
    return tuple(None if i < full else size for i in range(layers))
