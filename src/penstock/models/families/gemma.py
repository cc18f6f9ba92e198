"""Gemma 1, 2 and 3: scaled embeddings, norms around zero, from 2 on also behind each part, windows in turn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from penstock.errors import ModelError
from penstock.models.config import DecoderConfig, HeadNormConfig, NormConfig, WeightMap
from penstock.models.families.llama import llama_like
from penstock.models.family import Family
from penstock.models.reader import ConfigReader, text_config

GEMMA = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
GEMMA2 = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}
GEMMA3 = GEMMA2 | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "sliding_window_pattern": 6,
}
SANDWICH = WeightMap(
    attention_out_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_out_norm="post_feedforward_layernorm",
)


def read_gemma(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Gemma 1 decoder from its config.json."""
    c = _reader(raw, GEMMA)
    activation = c.text("hidden_act")
    # the first releases say gelu where they mean its approximation
    return _gemma("gemma", c, activation="gelu_pytorch_tanh" if activation == "gelu" else activation), WeightMap()


def read_gemma2(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Gemma 2 decoder from its config.json."""
    c = _reader(raw, GEMMA2)
    sliding = [i % 2 == 0 for i in range(c.integer("num_hidden_layers"))]
    windows = c.windows(c.maybe_integer("sliding_window"), sliding)
    softcap = c.maybe_number("attn_logit_softcapping")
    return _gemma("gemma2", c, windows=windows, attention_softcap=softcap, **_capped(c)), SANDWICH


def read_gemma3(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of the text decoder of Gemma 3 from its config.json."""
    c = _reader(raw, GEMMA3, {"_sliding_window_pattern": "sliding_window_pattern"})
    every, dim = c.integer("sliding_window_pattern"), c.integer("head_dim")
    windows = c.windows(
        c.integer("sliding_window"), [bool((i + 1) % every) for i in range(c.integer("num_hidden_layers"))]
    )
    everywhere = c.rope(dim, "full_attention", theta=1e6)
    nearby = ConfigReader(  # the scaling of an older config.json is that of the layers that see everything
        {
            "rope_theta": c.raw.get("rope_local_base_freq"),
            "rope_parameters": c.raw.get("rope_parameters"),
            "max_position_embeddings": c.raw["max_position_embeddings"],
        }
    ).rope(dim, "sliding_attention")
    norm = _norm(c)
    config = _gemma(
        "gemma3_text",
        c,
        rope=everywhere,
        layer_ropes=tuple(everywhere if window is None else nearby for window in windows),
        windows=windows,
        qk_norm=HeadNormConfig(norm),
        **_capped(c),
    )
    return config, SANDWICH


def _reader(
    raw: Mapping[str, Any], defaults: Mapping[str, Any], aliases: Mapping[str, str] | None = None
) -> ConfigReader:
    c = ConfigReader(raw, defaults, aliases)
    if c.flag("use_bidirectional_attention"):
        raise ModelError("config.json: a model with bidirectional attention makes embeddings, not text")
    return c


def _capped(c: ConfigReader) -> dict[str, Any]:
    """What Gemma 2 and 3 share. The attention scores of Gemma 3 are never capped, whatever its config.json says."""
    return {
        "activation": c.text("hidden_activation"),
        "attention_scale": c.positive("query_pre_attn_scalar") ** -0.5,
        "logit_softcap": c.maybe_number("final_logit_softcapping"),
    }


def _gemma(family: str, c: ConfigReader, **given: Any) -> DecoderConfig:
    multiplier = math.sqrt(c.integer("hidden_size"))
    return llama_like(family, c, norm=_norm(c), embedding_multiplier=multiplier, mlp_bias=False, **given)


def _norm(c: ConfigReader) -> NormConfig:
    return NormConfig(eps=c.number("rms_norm_eps"), offset=1.0)


def read_gemma3_whole(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The text decoder of a Gemma 3 that also sees images."""
    return read_gemma3(text_config(raw))


FAMILIES = {
    "gemma": Family("Gemma 1, CodeGemma", read_gemma),
    "gemma2": Family("Gemma 2", read_gemma2),
    "gemma3_text": Family("Gemma 3 (270M, 1B)", read_gemma3),
    "gemma3": Family("Gemma 3 (4B, 12B, 27B), its text decoder", read_gemma3_whole),
}
