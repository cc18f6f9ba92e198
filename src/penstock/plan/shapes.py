"""The parameters of a model, counted from its config.json alone: a table of what each family's layers hold.

Only shapes are here; what they weigh in a format is `weights.py`, what they cost a step is `roofline.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from penstock.errors import ModelError
from penstock.plan.families import FAMILIES, Family


@dataclass(frozen=True)
class Shape:
    """Counts of parameters, by how a step uses them.

    embedding: tables of which a token reads one row; matrices: what a token is multiplied with in the layers, experts
    included; active: the part of `matrices` that one token multiplies when decoding; head: the output matrix, also
    when it is the embedding (tied); other: norms, biases, routers, and towers for images.
    kv_width: numbers that one layer's cache keeps of a token; windows: tokens that each layer's cache keeps, None: all.
    steps: layers that a decoding step goes through. exact: False for a family that the table lacks.
    """

    family: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    embedding: int
    matrices: int
    active: int
    head: int
    tied: bool
    other: int
    kv_width: int
    windows: tuple[int | None, ...]
    experts: int = 0
    chosen: int = 0
    exact: bool = True

    @property
    def parameters(self) -> int:
        """Everything that a checkpoint stores, a tied head once."""
        return self.embedding + self.matrices + self.other + (0 if self.tied else self.head)

    def kv_values(self, tokens: int) -> int:
        """Numbers in the cache of one sequence of so many tokens."""
        return self.kv_width * sum(tokens if window is None else min(tokens, window) for window in self.windows)


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Count a model. config: its config.json. Raises ModelError when a number that is needed is missing or absurd."""
    kind = str(config.get("model_type") or "")
    if kind == "t5":
        return _encoder_decoder(_Numbers(config))
    if isinstance(config.get("text_config"), Mapping):
        text = {"model_type": "llama", **config["text_config"]}
        if "tie_word_embeddings" in config:
            text["tie_word_embeddings"] = config["tie_word_embeddings"]
        inner = shape_of(text)
        return replace(inner, family=kind or inner.family, other=inner.other + _vision(config, inner.hidden))
    shape = _decoder(_Numbers(config), FAMILIES.get(kind, FAMILIES["llama"]))
    return replace(shape, family=kind or "unknown", exact=kind in FAMILIES)


class _Numbers:
    """Look-ups in a config.json under its several spellings."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def number(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self.raw.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
                    raise ModelError(f"config.json: `{name}` must be a whole number, not {str(value)[:40]}.")
                return value
        if default is None:
            raise ModelError(f"config.json lacks `{names[0]}`, so this model cannot be planned.")
        return default

    def flag(self, rule: bool | str, default: bool = False) -> bool:
        """A fixed yes or no, or the name of the config's own flag (`name=yes` for one that is set by default)."""
        if isinstance(rule, bool):
            return rule
        name, _, preset = rule.partition("=")
        value = self.raw.get(name)
        return (preset == "yes" or default) if value is None else bool(value)


def _decoder(c: _Numbers, family: Family) -> Shape:
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

    dense = (3 if family.gated else 2) * hidden * inner
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


def _kv_heads(c: _Numbers, family: Family, heads: int) -> int:
    if family.multi_query:  # Falcon and BigCode: a flag, and the number only with the newer architecture
        if c.flag("new_decoder_architecture"):
            return c.number("num_kv_heads", default=heads)
        return 1 if c.flag(family.multi_query) else heads
    return c.number("num_key_value_heads", default=family.kv_heads or heads)


def _norms(c: _Numbers, family: Family) -> int:
    """Norms a layer, each as wide as the model; parallel residuals share one."""
    if c.flag("new_decoder_architecture"):
        return c.number("num_ln_in_parallel_attn", default=2)
    return 1 if family.parallel and c.flag(family.parallel) else family.norms


def _sparse_layers(c: _Numbers, layers: int) -> int:
    """How many layers have experts."""
    only = c.raw.get("mlp_only_layers")
    dense = set(only) if isinstance(only, list) else set()
    step = max(1, c.number("decoder_sparse_step", default=1))
    return sum(1 for layer in range(layers) if layer not in dense and (layer + 1) % step == 0)


def _windows(c: _Numbers, layers: int) -> tuple[int | None, ...]:
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


def _encoder_decoder(c: _Numbers) -> Shape:
    """T5 in both versions. The encoder runs once a prompt; a step reads the decoder, without the matrices that make
    keys and values of the prompt."""
    hidden, inner = c.number("d_model"), c.number("d_ff")
    heads, head_dim = c.number("num_heads"), c.number("d_kv")
    encoder = c.number("num_layers")
    decoder = c.number("num_decoder_layers", default=encoder)
    vocab, width = c.number("vocab_size"), heads * head_dim
    gated = str(c.raw.get("feed_forward_proj", "relu")).startswith("gated")
    mlp, attention = (3 if gated else 2) * hidden * inner, 4 * hidden * width
    buckets = c.number("relative_attention_num_buckets", default=32)
    return Shape(
        family="t5",
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
        other=hidden * (2 * encoder + 3 * decoder + 2) + 2 * buckets * heads,
        kv_width=2 * width,
        windows=(None,) * decoder,
    )


def _vision(config: Mapping[str, Any], text_hidden: int) -> int:
    """The image tower (CLIP or SigLIP) and the two-layer projector of LLaVA and its kin, where the config has them."""
    raw = config.get("vision_config")
    if not isinstance(raw, Mapping):
        return 0
    c = _Numbers(raw)
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
