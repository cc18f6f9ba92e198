"""Counts of models that are no plain stack of decoder layers: T5, DeepSeek's latent attention, towers for images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.plan.shape import Numbers, Shape

ENCODER_DECODERS = ("t5", "mt5", "umt5")


def encoder_decoder(c: Numbers) -> Shape:
    """T5 in both versions, mT5 and UMT5. The encoder runs once a prompt; a step reads the decoder, without the matrices
    that make keys and values of the prompt."""
    kind = str(c.raw.get("model_type"))
    hidden, inner = c.number("d_model"), c.number("d_ff")
    heads, head_dim = c.number("num_heads"), c.number("d_kv")
    encoder = c.number("num_layers")
    decoder = c.number("num_decoder_layers", default=encoder)
    vocab, width = c.number("vocab_size"), heads * head_dim
    gated = str(c.raw.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")).startswith("gated")
    mlp, attention = (3 if gated else 2) * hidden * inner, 4 * hidden * width
    buckets = c.number("relative_attention_num_buckets", default=32)
    biases = encoder + decoder if kind == "umt5" else 2  # layers with a table of their own
    return Shape(
        family=kind,
        vocab=vocab,
        hidden=hidden,
        intermediate=inner,
        layers=decoder,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        max_positions=c.number("n_positions", default=512),
        embedding=vocab * hidden,
        matrices=encoder * (attention + mlp) + decoder * (2 * attention + mlp),
        active=decoder * (attention + attention // 2 + mlp),
        head=vocab * hidden,
        tied=c.flag("tie_word_embeddings=yes"),
        other=hidden * (2 * encoder + 3 * decoder + 2) + biases * buckets * heads,
        kv_width=2 * width,
        windows=(None,) * decoder,
    )


def latent(c: Numbers, family: str) -> Shape:
    """DeepSeek-V2 and V3: keys and values made of a narrow row, fine experts beside shared ones. The cache is counted
    as the engine keeps it, a key and a value for each head."""
    third = family == "deepseek_v3"
    hidden, layers = c.number("hidden_size"), c.number("num_hidden_layers")
    heads, vocab = c.number("num_attention_heads"), c.number("vocab_size")
    turned, plain = c.number("qk_rope_head_dim", default=64), c.number("qk_nope_head_dim", default=128)
    value, narrow = c.number("v_head_dim", default=128), c.number("kv_lora_rank", default=512)
    query = c.number("q_lora_rank", default=0)
    queries = heads * (turned + plain)
    attention = (hidden + queries) * query if query else hidden * queries
    attention += hidden * (narrow + turned) + narrow * heads * (plain + value) + heads * value * hidden
    biases = (query + narrow + turned + hidden) * c.flag("attention_bias")
    dense = min(layers, c.number("first_k_dense_replace", default=3 if third else 0))
    experts = c.number("n_routed_experts", "num_experts", "num_local_experts", default=256 if third else 64)
    chosen = c.number("num_experts_per_tok", default=8 if third else 6)
    expert = 3 * hidden * c.number("moe_intermediate_size", default=2048 if third else 1407)
    shared = expert * c.number("n_shared_experts", default=1 if third else 2)
    inner = c.number("intermediate_size")
    always = layers * attention + dense * 3 * hidden * inner + (layers - dense) * shared
    norms = 2 * hidden + query + narrow
    return Shape(
        family=family,
        vocab=vocab,
        hidden=hidden,
        intermediate=inner,
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=turned + plain,
        max_positions=c.number("max_position_embeddings", default=4096),
        embedding=vocab * hidden,
        matrices=always + (layers - dense) * experts * expert,
        active=always + (layers - dense) * chosen * expert,
        head=vocab * hidden,
        tied=c.flag("tie_word_embeddings"),
        other=layers * (norms + biases) + (layers - dense) * hidden * experts + hidden,
        kv_width=2 * queries,
        windows=(None,) * layers,
        experts=experts,
        chosen=chosen,
    )


def vision(config: Mapping[str, Any], text_hidden: int) -> int:
    """The image tower (CLIP or SigLIP) and the two-layer projector of LLaVA and its kin, where the config has them."""
    raw = config.get("vision_config")
    if not isinstance(raw, Mapping):
        return 0
    c = Numbers(raw)
    hidden, inner = c.number("hidden_size", default=1024), c.number("intermediate_size", default=4096)
    layers, patch = c.number("num_hidden_layers", default=24), c.number("patch_size", default=14)
    patches = (c.number("image_size", default=336) // max(1, patch)) ** 2
    clip = raw.get("model_type", "clip_vision_model") == "clip_vision_model"
    layer = 4 * (hidden * hidden + hidden) + 2 * hidden * inner + inner + hidden + 4 * hidden
    tables = 3 * patch * patch * hidden + (patches + clip + 1) * hidden  # class token or bias
    norms = 4 * hidden if clip else 2 * hidden
    if config.get("model_type") == "gemma3":
        projector = hidden * text_hidden + hidden
    else:
        projector = hidden * text_hidden + text_hidden * text_hidden + 2 * text_hidden
    return layers * layer + tables + norms + projector
