"""The parameters of a model, counted from its config.json alone: a table of what each family's layers hold.

Only shapes are here; what they weigh in a format is `weights.py`, what they cost a step is `roofline.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from penstock.errors import ModelError
from penstock.plan.families import FAMILIES, Family
from penstock.plan.odd_shapes import ENCODER_DECODERS, encoder_decoder, latent, vision
from penstock.plan.shape import Numbers, Shape


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Count a model. config: its config.json. Raises ModelError when a number that is needed is missing or absurd."""
    kind = str(config.get("model_type") or "")
    if kind in ENCODER_DECODERS:
        return encoder_decoder(Numbers(config))
    if kind in ("deepseek_v2", "deepseek_v3"):
        return latent(Numbers(config), kind)
    if isinstance(config.get("text_config"), Mapping):
        text = {"model_type": "llama", **config["text_config"]}
        if "tie_word_embeddings" in config:
            text["tie_word_embeddings"] = config["tie_word_embeddings"]
        inner = shape_of(text)
        return replace(inner, family=kind or inner.family, other=inner.other + vision(config, inner.hidden))
    shape = _decoder(Numbers(config), FAMILIES.get(kind, FAMILIES["llama"]))
    return replace(shape, family=kind or "unknown", exact=kind in FAMILIES)


def _decoder(c: Numbers, family: Family) -> Shape:
    hidden = c.number("hidden_size", "n_embd", "n_embed", "d_model")
    layers = c.number("num_hidden_layers", "n_layer", "num_layers")
    heads = c.number("num_attention_heads", "n_head", "num_heads")
    vocab = c.number("vocab_size")
    if min(hidden, layers, heads) < 1:
        raise ModelError("config.json: a model has at least one layer, one head and some width.")
    head_dim = c.number("head_dim", default=family.head_dim or hidden // heads)
    kv_heads = _kv_heads(c, family, heads)
    q, kv = heads * head_dim, kv_heads * head_dim
    inner = c.number("intermediate_size", "ffn_hidden_size", "ffn_dim", "n_inner", default=family.inner * hidden)
    wide = c.number("word_embed_proj_dim", default=hidden)

    attention = hidden * (q + 2 * kv) + q * hidden
    other = (q + 2 * kv) * c.flag(family.qkv_bias) + hidden * c.flag(family.out_bias)
    norm = hidden * (int(c.flag(family.norm_weight)) + int(c.flag(family.norm_bias)))
    other += norm * _norms(c, family)
    if family.qk_norm and c.flag(family.qk_norm_flag):
        other += {"head": 2 * head_dim, "head+bias": 4 * head_dim, "all": q + kv}[family.qk_norm]

    dense = (3 if family.gated else 2) * hidden * c.number("intermediate_size_mlp", default=inner)
    dense_bias = (inner * (2 if family.gated else 1) + hidden) * c.flag(family.mlp_bias)
    experts = c.number(*family.experts, default=0) if family.experts else 0
    sparse_layers = _sparse_layers(c, layers) if experts else 0
    chosen = min(experts, c.number("num_experts_per_tok", default=2)) if experts else 0
    matrices = layers * attention + (layers - sparse_layers) * dense
    active = matrices
    total_other = layers * other + (layers - sparse_layers) * dense_bias
    if experts:
        expert = 3 * hidden * c.number("moe_intermediate_size", default=inner)
        shared = 3 * hidden * c.number(*family.shared, default=0) if family.shared else 0
        matrices += sparse_layers * (experts * expert + shared)
        active += sparse_layers * (chosen * expert + shared)
        total_other += sparse_layers * hidden * (experts + (1 if family.shared_gate else 0))

    positions = c.number("max_position_embeddings", "n_positions", "seq_length", default=2048)
    embedding = vocab * wide + (positions + family.position_offset) * hidden * family.learned_positions
    projections = 2 * wide * hidden if wide != hidden else 0
    if c.flag(family.final_norm):
        total_other += norm
    total_other += norm * family.embedding_norm + vocab * c.flag(family.head_bias)
    return Shape(
        family="",
        vocab=vocab,
        hidden=hidden,
        intermediate=inner,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=positions,
        embedding=embedding,
        matrices=matrices + projections,
        active=active + projections,
        head=vocab * wide,
        tied=c.flag(family.tied),
        other=total_other,
        kv_width=2 * kv,
        windows=_windows(c, layers),
        experts=experts,
        chosen=chosen,
    )


def _kv_heads(c: Numbers, family: Family, heads: int) -> int:
    if family.multi_query:  # Falcon and BigCode: a flag, and the number only with the newer architecture
        if c.flag("new_decoder_architecture"):
            return c.number("num_kv_heads", default=heads)
        return 1 if c.flag(family.multi_query) else heads
    return c.number("num_key_value_heads", default=family.kv_heads or heads)


def _norms(c: Numbers, family: Family) -> int:
    """Norms a layer, each as wide as the model; parallel residuals share one."""
    if c.flag("new_decoder_architecture"):
        return c.number("num_ln_in_parallel_attn", default=2)
    return 1 if family.parallel and c.flag(family.parallel) else family.norms


def _sparse_layers(c: Numbers, layers: int) -> int:
    """How many layers have experts."""
    only = c.raw.get("mlp_only_layers")
    dense = set(only) if isinstance(only, list) else set()
    step = max(1, c.number("decoder_sparse_step", "interleave_moe_layer_step", default=1))
    return sum(1 for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)


def _windows(c: Numbers, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer."""
    size = c.number("sliding_window", default=0)
    kinds = c.raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        return tuple(size if kind == "sliding_attention" and size else None for kind in kinds)
    if not size or not c.flag("use_sliding_window", default=True):
        return (None,) * layers
    pattern = c.number("sliding_window_pattern", default=2 if c.raw.get("model_type") == "gemma2" else 0)
    if pattern > 1:
        return tuple(None if (layer + 1) % pattern == 0 else size for layer in range(layers))
    first = c.number("max_window_layers", default=0)  # Qwen: only layers from here on
    return tuple(size if layer >= first else None for layer in range(layers))
