"""Counted parameters against transformers' own models, built without memory on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

from penstock.errors import ModelError
from penstock.plan.odd_shapes import ENCODER_DECODERS
from penstock.plan.shapes import shape_of

SMALL: dict[str, Any] = {"vocab_size": 1000, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6}
GQA: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 200}
GPT: dict[str, Any] = {"vocab_size": 1000, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 128}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **GQA},
    "llama, no kv heads given": {"model_type": "llama", **SMALL, "intermediate_size": 200},
    "llama, tied, biases": {
        "model_type": "llama", **GQA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
    },
    "llama, wide heads": {"model_type": "llama", **GQA, "head_dim": 32},
    "llama4": {
        "model_type": "llama4_text", **GQA, "intermediate_size_mlp": 300, "num_local_experts": 4, "head_dim": 16,
        "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "pad_token_id": 1, "use_qk_norm": True,
    },
    "smollm3": {"model_type": "smollm3", **GQA, "pad_token_id": 1},
    "deepseek 2 lite": {
        "model_type": "deepseek_v2", **SMALL, "intermediate_size": 200, "moe_intermediate_size": 40,
        "q_lora_rank": None, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20,
        "n_routed_experts": 6, "n_shared_experts": 2, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
        "pad_token_id": 1,
    },
    "deepseek 3": {
        "model_type": "deepseek_v3", **SMALL, "intermediate_size": 200, "moe_intermediate_size": 40, "q_lora_rank": 32,
        "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20, "n_routed_experts": 8,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "pad_token_id": 1,
    },
    "mistral": {"model_type": "mistral", **GQA},
    "mixtral": {"model_type": "mixtral", **GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"model_type": "qwen2", **GQA, "tie_word_embeddings": True},
    "qwen2 moe": {
        "model_type": "qwen2_moe", **GQA, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 80, "decoder_sparse_step": 1, "mlp_only_layers": [1],
    },
    "qwen3": {"model_type": "qwen3", **GQA, "head_dim": 32},
    "qwen3 moe": {
        "model_type": "qwen3_moe", **GQA, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
    },
    "phi": {"model_type": "phi", **GQA},
    "phi, normed": {"model_type": "phi", **GQA, "qk_layernorm": True},
    "phi3": {"model_type": "phi3", **GQA, "pad_token_id": 1},
    "phimoe": {"model_type": "phimoe", **GQA, "num_local_experts": 4, "lm_head_bias": True, "attention_bias": True},
    "gemma": {"model_type": "gemma", **GQA, "head_dim": 32},
    "gemma2": {"model_type": "gemma2", **GQA, "head_dim": 32},
    "gemma3": {"model_type": "gemma3_text", **GQA, "head_dim": 32},
    "falcon 7b": {"model_type": "falcon", **SMALL, "multi_query": True, "parallel_attn": True},
    "falcon 40b": {"model_type": "falcon", **SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon rw": {
        "model_type": "falcon", **SMALL, "multi_query": False, "parallel_attn": False, "bias": True, "alibi": True,
    },
    "falcon 11b": {
        "model_type": "falcon", **SMALL, "new_decoder_architecture": True, "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1, "ffn_hidden_size": 300, "tie_word_embeddings": False,
    },
    "bloom": {"model_type": "bloom", "vocab_size": 1000, "hidden_size": 96, "n_layer": 3, "n_head": 6},
    "opt": {"model_type": "opt", **SMALL, "ffn_dim": 200, "word_embed_proj_dim": 96, "max_position_embeddings": 64},
    "opt 350m": {
        "model_type": "opt", **SMALL, "ffn_dim": 200, "word_embed_proj_dim": 48, "do_layer_norm_before": False,
        "max_position_embeddings": 64,
    },
    "galactica": {
        "model_type": "opt", **SMALL, "ffn_dim": 384, "word_embed_proj_dim": 96, "enable_bias": False,
        "layer_norm_elementwise_affine": False,
    },
    "neox": {"model_type": "gpt_neox", **SMALL, "intermediate_size": 384},
    "gptj": {"model_type": "gptj", **GPT, "rotary_dim": 8},
    "gpt2": {"model_type": "gpt2", **GPT},
    "bigcode": {"model_type": "gpt_bigcode", **GPT, "multi_query": True},
    "bigcode, many heads": {"model_type": "gpt_bigcode", **GPT, "multi_query": False, "n_inner": 200},
    "starcoder2": {"model_type": "starcoder2", **GQA},
    "starcoder2, untied": {"model_type": "starcoder2", **GQA, "use_bias": False, "tie_word_embeddings": False},
    "stablelm": {"model_type": "stablelm", **GQA, "use_qkv_bias": True},
    "stablelm 12b": {"model_type": "stablelm", **GQA, "use_parallel_residual": True, "qk_layernorm": True},
    "olmo": {"model_type": "olmo", **GQA, "pad_token_id": 1},
    "olmo2": {"model_type": "olmo2", **GQA, "pad_token_id": 1},
    "olmoe": {"model_type": "olmoe", **GQA, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 1},
    "granite": {"model_type": "granite", **GQA, "tie_word_embeddings": True, "attention_bias": True},
    "granite moe": {"model_type": "granitemoe", **GQA, "num_local_experts": 4},
    "cohere": {"model_type": "cohere", **GQA, "pad_token_id": 0},
    "cohere, normed": {"model_type": "cohere", **GQA, "use_qk_norm": True, "pad_token_id": 0},
    "cohere2": {"model_type": "cohere2", **GQA, "pad_token_id": 0},
    "t5": {"model_type": "t5", "vocab_size": 1000, "d_model": 96, "d_kv": 16, "d_ff": 200, "num_layers": 3,
           "num_heads": 6},
    "flan-t5": {
        "model_type": "t5", "vocab_size": 1000, "d_model": 96, "d_kv": 32, "d_ff": 200, "num_layers": 3,
        "num_decoder_layers": 4, "num_heads": 6, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    "mt5": {"model_type": "mt5", "vocab_size": 1000, "d_model": 96, "d_kv": 16, "d_ff": 200, "num_layers": 3,
            "num_heads": 6},
    "umt5": {"model_type": "umt5", "vocab_size": 1000, "d_model": 96, "d_kv": 16, "d_ff": 200, "num_layers": 3,
             "num_heads": 6},
    "llava": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", **GQA},
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 120, "num_hidden_layers": 2,
            "num_attention_heads": 4, "image_size": 56, "patch_size": 14,
        },
    },
}  # fmt: skip


def build(config: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Parameters that transformers counts (a tied one once), and the config.json that it would write."""
    parsed = AutoConfig.for_model(**config)
    pairs = dict.fromkeys(ENCODER_DECODERS, AutoModelForSeq2SeqLM)
    kinds = {**pairs, "llava": AutoModelForImageTextToText}
    with torch.device("meta"):
        model = kinds.get(config["model_type"], AutoModelForCausalLM).from_config(parsed)
    return sum(p.numel() for p in model.parameters()), parsed.to_diff_dict()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    """Both from what was given and from a config.json as transformers writes it."""
    given = CONFIGS[name]
    count, written = build(given)
    for config in (given, {**written, "model_type": given["model_type"]}):
        shape = shape_of(config)
        assert shape.exact
        # transformers always ties T5's head; the checkpoints of its second version have one of their own
        untied = shape.head if name == "flan-t5" and not shape.tied else 0
        assert shape.parameters == pytest.approx(count + untied, rel=0.005), shape


@pytest.mark.parametrize(
    ("config", "billions"),
    [
        ({"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
          "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256}, 70.55),
        ({"model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880}, 176.25),
        ({"model_type": "t5", "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
          "vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, 11.14),
    ],
)  # fmt: skip
def test_published_sizes(config: dict[str, Any], billions: float) -> None:
    assert shape_of(config).parameters / 1e9 == pytest.approx(billions, rel=0.001)


def test_cache_of_windows_and_heads() -> None:
    shape = shape_of({**CONFIGS["llama"], "head_dim": 16})
    assert shape.kv_values(10) == 10 * 3 * 2 * 2 * 16
    gemma = shape_of({**CONFIGS["gemma2"], "sliding_window": 8})
    assert gemma.windows == (8, None, 8)
    assert gemma.kv_values(100) == gemma.kv_width * (8 + 100 + 8)
    qwen = shape_of({**CONFIGS["qwen2"], "sliding_window": 8, "use_sliding_window": False})
    assert qwen.windows == (None,) * 3


def test_experts_count_whole_but_work_in_part() -> None:
    shape = shape_of(CONFIGS["mixtral"])
    expert = 3 * 96 * 200
    assert shape.matrices - shape.active == 3 * 2 * expert


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "lacks `hidden_size`"),
        ({"vocab_size": "many"}, "must be a whole number"),
        ({"num_hidden_layers": -1}, "must be a whole number"),
        ({"num_attention_heads": 0}, "at least one"),
    ],
)
def test_a_config_that_cannot_be_counted(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        shape_of({**CONFIGS["llama"], **change})


def test_an_unknown_family_is_said_to_be_a_guess() -> None:
    assert not shape_of({**CONFIGS["llama"], "model_type": "brandnew"}).exact
