"""config.json and generation_config.json as the metadata of a GGUF file gives them."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from penstock.errors import ModelError
from penstock.hub.folder import damaged
from penstock.hub.gguf.file import GgufModel

FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")
_MODEL_TYPES = {"gemma3": "gemma3_text"}
# Where a Gemma's scale of attention is not that of its head size; GGUF has no key for it, only the sizes tell.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models
_ENDS_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|end_of_text|>")


def config_of(model: GgufModel) -> dict[str, Any]:
    """The model's config.json. Raises ModelError for a family that is not known, or a value that cannot be."""
    family = model.metadata.get("general.architecture")
    if family not in FAMILIES:
        raise ModelError(
            f"The GGUF file {model.file} is of architecture {str(family)[:40]!r}.",
            f"From GGUF files these are read: {', '.join(FAMILIES)} (Mistral's call themselves llama).",
            "Take the model's safetensors repository.",
        )
    meta = _Meta(model, str(family))
    if meta.integer("expert_count", 0):
        raise ModelError(
            f"The GGUF file {model.file} is a mixture of experts.",
            "Those are not read from GGUF files.",
            "Take the model's safetensors repository.",
        )
    hidden, heads, layers = meta.integer("embedding_length"), meta.integer("attention.head_count"), meta.layers
    embedding = model.tensors.get("token_embd.weight")
    if embedding is None or embedding.shape[1:] != (hidden,):
        raise damaged(model.file, f"Its token_embd.weight is not a table of {hidden} columns.")
    head_dim = meta.integer("attention.key_length", hidden // heads)
    if meta.integer("attention.value_length", head_dim) != head_dim or meta.integer(
        "rope.dimension_count", head_dim
    ) not in (0, head_dim):
        raise damaged(model.file, "Its heads have keys, values or rotary parts of different sizes.")
    biased = "blk.0.attn_q.bias" in model.tensors
    config = {
        "model_type": _MODEL_TYPES.get(meta.family, meta.family),
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": meta.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(meta, head_dim),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in model.tensors,
        "attention_bias": biased and "blk.0.attn_output.bias" in model.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in model.tensors,
        "dtype": _dtype(model),
    }
    window = meta.integer("attention.sliding_window", 0)
    if meta.family == "llama" and window:
        config |= {"model_type": "mistral", "sliding_window": window}
    if meta.family.startswith("gemma"):
        config |= _gemma(meta, head_dim, window)
    return config | {key: value for key, value in _token_ids(meta).items() if key != "eos_token_id"}


def generation_config_of(model: GgufModel) -> dict[str, Any]:
    """The model's generation_config.json: every token that ends an answer, as the file marks and names them."""
    return _token_ids(_Meta(model, ""))


class _Meta:
    """Typed look-ups in the metadata, under the family's prefix, with errors that name the key."""

    def __init__(self, model: GgufModel, family: str) -> None:
        self.model, self.family = model, family

    @property
    def layers(self) -> int:
        return self.integer("block_count")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.model.metadata.get(f"{self.family}.{key}", default)
        if type(value) is not int or not 0 <= value < 2**31 or (default is None and value == 0):
            raise damaged(self.model.file, f"Its {self.family}.{key} is {str(value)[:40]}, not a positive integer.")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.model.metadata.get(f"{self.family}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise damaged(self.model.file, f"Its {self.family}.{key} is {str(value)[:40]}, not a positive number.")
        return float(value)


def _dtype(model: GgufModel) -> str:
    """The type to compute in: that of the matrices, or bfloat16 where they are quantized."""
    kinds = {tensor.kind for tensor in model.tensors.values() if len(tensor.shape) == 2}
    return {"F32": "float32", "F16": "float16"}.get(kinds.pop(), "bfloat16") if len(kinds) == 1 else "bfloat16"


def _gemma(meta: _Meta, head_dim: int, window: int) -> dict[str, Any]:
    """What only Gemma's config.json has."""
    family, layers = meta.family, meta.layers
    config: dict[str, Any] = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
    if family == "gemma":
        return config
    scale = head_dim
    if layers == _SCALED_BY_WIDTH[family]:
        scale = meta.integer("embedding_length") // meta.integer("attention.head_count")
    if f"{family}.attention.scale" in meta.model.metadata:
        scale = round(meta.number("attention.scale", 1.0) ** -2)
    every = 2 if family == "gemma2" else 6  # the last layer of so many sees everything
    kinds = ["sliding_attention" if window and (i + 1) % every else "full_attention" for i in range(layers)]
    config |= {"query_pre_attn_scalar": scale, "sliding_window": window or None, "layer_types": kinds}
    for key, gemma_2 in (("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0)):
        default = gemma_2 if family == "gemma2" else None
        config[key] = meta.number(key, 1.0) if f"{family}.{key}" in meta.model.metadata else default
    if family == "gemma3":
        config["rope_local_base_freq"] = meta.number("rope.freq_base_swa", 10000.0)
    return config


def _rope_scaling(meta: _Meta, head_dim: int) -> dict[str, Any] | None:
    kind = meta.model.metadata.get(f"{meta.family}.rope.scaling.type", "none")
    if "rope_freqs.weight" in meta.model.tensors:
        return _llama3(meta, head_dim)
    if kind == "linear":
        return {"rope_type": "linear", "factor": meta.number("rope.scaling.factor", 1.0)}
    if kind == "yarn":
        factor = meta.number("rope.scaling.factor", 1.0)
        scaling: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": meta.integer("rope.scaling.original_context_length"),
            "beta_fast": meta.number("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": meta.number("rope.scaling.yarn_beta_slow", 1.0),
        }
        if f"{meta.family}.rope.scaling.attn_factor" in meta.model.metadata:
            magnitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
            scaling["attention_factor"] = meta.number("rope.scaling.attn_factor", 1.0) * magnitude
        return scaling
    if kind != "none":
        raise damaged(meta.model.file, f"Its rope scaling {str(kind)[:40]!r} is not known.")
    return None


def _llama3(meta: _Meta, head_dim: int) -> dict[str, Any]:
    """Llama 3.1's scaling from the factors that GGUF keeps of it, one for each pair of dimensions.

    The factors are made of four numbers. Only their largest is among them; the others are found by trying what
    published models use, and it is checked that exactly these factors come out.
    """
    tensor = meta.model.tensors["rope_freqs.weight"]
    if tensor.kind != "F32" or tensor.shape != (head_dim // 2,):
        raise damaged(meta.model.file, f"Its rope_freqs.weight does not fit heads of {head_dim}.")
    with tensor.file.open("rb") as file:
        raw = os.pread(file.fileno(), tensor.end - tensor.start, tensor.start)
    factors = np.frombuffer(raw, "<f4").astype(np.float64)
    base = meta.number("rope.freq_base", 10000.0) ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = base / (2 * math.pi)  # per token
    factor = float(np.max(factors)) if len(factors) else 1.0
    if not 1 <= factor < 1e6:
        raise damaged(meta.model.file, "Its rope_freqs.weight holds impossible factors.")
    for original in (2**k for k in range(5, 21)):
        for low, high in ((1.0, 4.0), (1.0, 2.0), (1.0, 8.0), (1.0, 32.0), (4.0, 8.0)):
            smooth = np.clip((original * turns - low) / (high - low), 0, 1)
            if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low,
                    "high_freq_factor": high,
                    "original_max_position_embeddings": original,
                }
    raise damaged(meta.model.file, "The factors of its rope_freqs.weight are of no scaling that is known.")


def _token_ids(meta: _Meta) -> dict[str, Any]:
    """The ids of the special tokens, eos_token_id a list of all that end an answer."""
    metadata = meta.model.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    kinds = metadata.get("tokenizer.ggml.token_type")
    names: list[str] = tokens if isinstance(tokens, list) else []

    def id_of(name: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int and 0 <= value < max(len(names), 1) else None

    ends = [id_of("eos"), id_of("eot"), id_of("eom")]
    if isinstance(kinds, np.ndarray) and len(kinds) == len(names):
        control = np.flatnonzero(kinds == 3)
        ends += [int(i) for i in control if names[i] in _ENDS_OF_TURN]
    found: dict[str, Any] = {"bos_token_id": id_of("bos"), "pad_token_id": id_of("padding")}
    found["eos_token_id"] = list(dict.fromkeys(i for i in ends if i is not None)) or None
    return {key: value for key, value in found.items() if value is not None}
