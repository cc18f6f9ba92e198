"""GGUF files made of tiny checkpoints, in the way llama.cpp's converter makes them, by the `gguf` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
KINDS = {kind.name: kind for kind in gguf.GGMLQuantizationType}


def write_gguf(
    folder: Path,
    file: Path,
    kind: str = "F32",
    tokenizer: dict[str, Any] | None = None,
    shards: int = 0,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of `folder` as a GGUF file. kind: of the matrices (norms and biases are F32).

    tokenizer: keys for `add_tokenizer`, or None for that of the folder; shards: so many tensors in each part.
    """
    config = json.loads((folder / "config.json").read_text())
    architecture = ARCHITECTURES[config["model_type"]]
    options = {"split_max_tensors": shards} if shards else {}
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture], **options)
    _add_config(writer, config)
    for key, value in (extra or {}).items():
        {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](
            key, value
        )
    _add_tokenizer(writer, tokenizer if tokenizer is not None else tokenizer_keys(folder))
    names = gguf.get_tensor_name_map(architecture, config["num_hidden_layers"])
    tensors = {}
    for part in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(part)
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    for name, tensor in tensors.items():
        array = stored(name, tensor.float(), config).numpy()
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        wanted = KINDS[kind] if array.ndim == 2 else KINDS["F32"]
        writer.add_tensor(theirs, gguf.quants.quantize(array, wanted), raw_dtype=wanted)
    factors = llama3_factors(config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def stored(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """A tensor as the converter stores it: Llama's q and k with neighbouring pairs, Gemma's norms with their 1."""
    if config["model_type"] in ("llama", "mistral"):
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:
                shape = (config[heads], 2, len(tensor) // config[heads] // 2, *tensor.shape[1:])
                return tensor.reshape(shape).swapaxes(1, 2).reshape(tensor.shape).contiguous()
    if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    return tensor.contiguous()


def llama3_factors(config: dict[str, Any]) -> np.ndarray | None:
    """The factors that stand for Llama 3.1's rope scaling."""
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    dim = config["head_dim"]
    wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    low, high, original = (
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )
    smooth = (original / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    factors = np.where(wavelengths > original / low, rope["factor"], between)
    return np.where(wavelengths < original / high, 1.0, factors).astype(np.float32)


def _add_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:  # gemma 3 has one for each kind of layer
        rope = rope["full_attention"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if rope.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if config["model_type"] in ("mistral", "gemma2", "gemma3_text") and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def tokenizer_keys(folder: Path, pre: str = "gpt-2") -> dict[str, Any]:
    """The byte-level tokenizer of a folder as the converter lists it."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = dict(tokenizer["model"]["vocab"])
    kinds = dict.fromkeys(vocabulary, gguf.TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        vocabulary[added["content"]] = added["id"]
        kinds[added["content"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "types": [kinds[token] for token in tokens],
        "merges": merges,
        "bos": vocabulary.get(settings.get("bos_token")),
        "eos": vocabulary.get(settings.get("eos_token")),
        "add_bos": True,
        "template": settings.get("chat_template"),
    }


def _add_tokenizer(writer: gguf.GGUFWriter, keys: dict[str, Any]) -> None:
    if not keys:
        return
    writer.add_tokenizer_model(keys["model"])
    if "pre" in keys:
        writer.add_tokenizer_pre(keys["pre"])
    writer.add_token_list(keys["tokens"])
    writer.add_token_types(keys["types"])
    if "merges" in keys:
        writer.add_token_merges(keys["merges"])
    if "scores" in keys:
        writer.add_token_scores(keys["scores"])
    for key, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("add_bos", writer.add_add_bos_token),
        ("space_prefix", writer.add_add_space_prefix),
        ("template", writer.add_chat_template),
    ):
        if keys.get(key) is not None:
            add(keys[key])
