"""Configurations of every family: the usual one, and random ones that turn each of its switches."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

Options = dict[str, Any]

TOKENS: Options = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
USUAL: Options = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    **TOKENS,
}
MULTI_HEAD = {key: value for key, value in USUAL.items() if key != "num_key_value_heads"}
FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
EXPERTS: Options = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
SHORT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": 512, **TOKENS}

# the shapes in which people know the families; those of `checkpoints.FAMILIES` come from here too
SHAPES: dict[str, Options] = {
    "llama": {"model_type": "llama", **USUAL},
    "llama-tied-bias": {
        "model_type": "llama",
        **USUAL,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama4": {
        "model_type": "llama4_text",
        **USUAL,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "intermediate_size_mlp": 96,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 40,
        "floor_scale": 30,
    },
    "mistral": {"model_type": "mistral", **USUAL, "sliding_window": 24},
    "mixtral": {"model_type": "mixtral", **USUAL, "num_local_experts": 4},
    "qwen2": {"model_type": "qwen2", **USUAL},
    "qwen2-window": {
        "model_type": "qwen2",
        **USUAL,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **USUAL, "head_dim": 32, "tie_word_embeddings": True},
    "qwen2-moe": {"model_type": "qwen2_moe", **USUAL, **EXPERTS, "shared_expert_intermediate_size": 80},
    "qwen3-moe": {"model_type": "qwen3_moe", **USUAL, **EXPERTS, "head_dim": 32, "norm_topk_prob": True},
    "phi-2": {"model_type": "phi", **MULTI_HEAD, "partial_rotary_factor": 0.4, "hidden_size": 80},
    "phi-3": {"model_type": "phi3", **USUAL, "sliding_window": 30},
    "phi-4-mini": {
        "model_type": "phi3",
        **USUAL,
        "tie_word_embeddings": True,
        "partial_rotary_factor": 0.75,
        "hidden_size": 128,
        "original_max_position_embeddings": 128,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0 + i / 40 for i in range(12)],
            "long_factor": [1.0 + i / 3 for i in range(12)],
        },
    },
    "gemma": {"model_type": "gemma", **USUAL, "head_dim": 32, "num_key_value_heads": 1},
    "gemma-2": {"model_type": "gemma2", **USUAL, "head_dim": 32, "sliding_window": 24, "query_pre_attn_scalar": 24},
    "gemma-3": {
        "model_type": "gemma3_text",
        **USUAL,
        "head_dim": 32,
        "sliding_window": 20,
        "num_hidden_layers": 7,
        "query_pre_attn_scalar": 32,
    },
    "falcon-7b": {"model_type": "falcon", **MULTI_HEAD, "tie_word_embeddings": True},
    "falcon-40b": {
        "model_type": "falcon",
        **MULTI_HEAD,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "tie_word_embeddings": False,
    },
    "falcon-rw": {
        "model_type": "falcon",
        **MULTI_HEAD,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "bloom": {"model_type": "bloom", "vocab_size": 512, "hidden_size": 64, "n_layer": 3, "n_head": 4, **TOKENS},
    "opt": {"model_type": "opt", **MULTI_HEAD, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "opt-350m": {
        "model_type": "opt",
        **MULTI_HEAD,
        "ffn_dim": 128,
        "word_embed_proj_dim": 32,
        "do_layer_norm_before": False,
    },
    "galactica": {
        "model_type": "opt",
        **MULTI_HEAD,
        "ffn_dim": 128,
        "enable_bias": False,
        "activation_function": "gelu",
        "layer_norm_elementwise_affine": False,
    },
    "pythia": {"model_type": "gpt_neox", **MULTI_HEAD},
    "gpt-j": {"model_type": "gptj", **SHORT, "rotary_dim": 8},
    "gpt-2": {"model_type": "gpt2", **SHORT},
    "starcoder": {"model_type": "gpt_bigcode", **SHORT},
    "starcoder2": {"model_type": "starcoder2", **USUAL, "sliding_window": 30},
    "stablelm": {"model_type": "stablelm", **USUAL, "use_qkv_bias": True},
    "stablelm-12b": {"model_type": "stablelm", **USUAL, "use_parallel_residual": True, "qk_layernorm": True},
    "olmo": {"model_type": "olmo", **USUAL, "clip_qkv": 1.5},
    "olmo-2": {"model_type": "olmo2", **USUAL},
    "olmoe": {"model_type": "olmoe", **USUAL, "num_experts": 8, "num_experts_per_tok": 2},
    "granite": {
        "model_type": "granite",
        **USUAL,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.3,
        "logits_scaling": 4.0,
    },
    "granite-moe": {"model_type": "granitemoe", **USUAL, "num_local_experts": 4, "attention_multiplier": 0.2},
    "granite-moe-shared": {
        "model_type": "granitemoeshared",
        **USUAL,
        "num_local_experts": 4,
        "shared_intermediate_size": 48,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.5,
    },
    "command-r": {"model_type": "cohere", **USUAL},
    "command-r-plus": {"model_type": "cohere", **USUAL, "use_qk_norm": True},
    "command-r7b": {"model_type": "cohere2", **USUAL, "sliding_window": 24, "num_hidden_layers": 5},
    "smollm3": {"model_type": "smollm3", **USUAL, "num_hidden_layers": 5},
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        **MULTI_HEAD,
        "kv_lora_rank": 24,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        **MULTI_HEAD,
        "kv_lora_rank": 24,
        "q_lora_rank": 40,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}

ACTIVATIONS = ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "gelu_fast", "quick_gelu"]


def random_options(model_type: str, rng: random.Random) -> Options:
    """A configuration of a family that transformers accepts, every switch of the family turned at random."""
    return {"model_type": model_type, **RANDOM[model_type](rng)}


def _coin(rng: random.Random, share: float = 0.5) -> bool:
    return rng.random() < share


def _size(rng: random.Random, even: bool = True) -> Options:
    """Vocabulary, width, depth, heads and positions; heads divide the width."""
    heads = rng.choice([1, 2, 3, 4, 6, 8])
    dim = rng.choice([4, 8, 10, 14, 16, 20, 24, 40] if even else [4, 7, 8, 10, 15, 16, 24])
    return {
        "vocab_size": rng.choice([300, 333, 512]),
        "hidden_size": heads * dim,
        "num_hidden_layers": rng.choice([1, 2, 3, 5]),
        "num_attention_heads": heads,
        "max_position_embeddings": rng.choice([256, 512]),
        "tie_word_embeddings": _coin(rng),
        **TOKENS,
    }


def _kv(rng: random.Random, size: Options) -> Options:
    heads = size["num_attention_heads"]
    return {"num_key_value_heads": rng.choice([n for n in range(1, heads + 1) if heads % n == 0])}


def _rope(rng: random.Random, size: Options) -> Options:
    """Rotary settings whose angles depend on the position alone."""
    theta, positions = rng.choice([500.0, 10000.0, 1e6]), size["max_position_embeddings"]
    kind = rng.choice(["default", "default", "linear", "yarn", "llama3"])
    block: Options = {"rope_type": kind, "rope_theta": theta}
    if kind == "linear":
        block["factor"] = rng.choice([2.0, 3.5])
    if kind == "yarn":
        block |= {"factor": 4.0, "original_max_position_embeddings": positions // 4}
        block |= rng.choice([{}, {"attention_factor": 1.3}, {"beta_fast": 16.0, "beta_slow": 2.0}])
    if kind == "llama3":
        block |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        block["original_max_position_embeddings"] = 64
    return {"rope_parameters": block}


def _wide(rng: random.Random) -> Options:
    return {"intermediate_size": rng.choice([32, 72, 100, 128])}


def _like_llama(rng: random.Random) -> Options:
    size = _size(rng)
    free = {"head_dim": rng.choice([4, 10, 16, 24, 32])} if _coin(rng) else {}
    biases = {"attention_bias": _coin(rng), "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3])}
    act = {"hidden_act": rng.choice(ACTIVATIONS)}
    return {**size, **_kv(rng, size), **_rope(rng, size), **_wide(rng), **free, **biases, **act}


def _no_head_dim(rng: random.Random) -> Options:
    """For families whose head size is always width / heads."""
    return {key: value for key, value in _like_llama(rng).items() if key != "head_dim"}


def _types(rng: random.Random, options: Options, other: str) -> Options:
    count = options["num_hidden_layers"]
    return {"layer_types": [rng.choice([FULL, other]) for _ in range(count)]} if _coin(rng) else {}


def _window(rng: random.Random) -> Options:
    return {"sliding_window": rng.choice([1, 7, 16, 30, 200])}


def _llama(rng: random.Random) -> Options:
    return _like_llama(rng) | {"mlp_bias": _coin(rng)}


def _mistral(rng: random.Random) -> Options:
    return _like_llama(rng) | rng.choice([{"sliding_window": None}, _window(rng)])


def _router(rng: random.Random) -> Options:
    count = rng.choice([2, 4, 7])
    return {"num_experts_per_tok": rng.randint(1, count), "num_local_experts": count}


def _mixtral(rng: random.Random) -> Options:
    return _mistral(rng) | _router(rng)


def _qwen2(rng: random.Random) -> Options:
    options = _no_head_dim(rng)
    windows = {"use_sliding_window": _coin(rng), "max_window_layers": rng.choice([0, 1, 2]), **_window(rng)}
    return options | windows | (_types(rng, options, SLIDING) if windows["use_sliding_window"] else {})


def _qwen3(rng: random.Random) -> Options:
    return _qwen2(rng) | {"head_dim": rng.choice([8, 16, 20, 32])}


def _sparse(rng: random.Random) -> Options:
    return {
        "moe_intermediate_size": rng.choice([24, 40]),
        "decoder_sparse_step": rng.choice([1, 1, 2]),
        "mlp_only_layers": rng.choice([None, [0]]),
        "norm_topk_prob": _coin(rng),
    }


def _qwen2_moe(rng: random.Random) -> Options:
    router = _router(rng)
    router["num_experts"] = router.pop("num_local_experts")
    shared = {"shared_expert_intermediate_size": rng.choice([24, 56]), "qkv_bias": _coin(rng)}
    return _qwen2(rng) | _sparse(rng) | router | shared


def _qwen3_moe(rng: random.Random) -> Options:
    router = _router(rng)
    router["num_experts"] = router.pop("num_local_experts")
    windows = {"use_sliding_window": _coin(rng), **_window(rng)}
    return _like_llama(rng) | windows | _sparse(rng) | router | {"head_dim": rng.choice([8, 16, 20])}


def _partial(rng: random.Random, options: Options) -> Options:
    """A share of the head that comes out even, as transformers wants it."""
    dim = options["hidden_size"] // options["num_attention_heads"]
    share = rng.choice(range(2, dim + 1, 2)) / dim
    options["rope_parameters"]["partial_rotary_factor"] = share + 1e-9 if share < 1 else 1.0
    return options


def _phi(rng: random.Random) -> Options:
    size = _size(rng, even=False)
    options = {**size, **_kv(rng, size), **_rope(rng, size), **_wide(rng), "hidden_act": rng.choice(ACTIVATIONS)}
    return _partial(rng, options) | {"qk_layernorm": _coin(rng)}


def _phi3(rng: random.Random) -> Options:
    options = _mistral(rng)
    options.pop("head_dim", None)
    positions = options["max_position_embeddings"]
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    options = _partial(rng, options) | {"original_max_position_embeddings": positions}
    if _coin(rng):
        dim = options["hidden_size"] // options["num_attention_heads"]
        pairs = int(dim * options["rope_parameters"]["partial_rotary_factor"]) // 2
        factors = {name: [rng.uniform(1, 9) for _ in range(pairs)] for name in ("short_factor", "long_factor")}
        options["rope_parameters"] |= {"rope_type": "longrope", **factors}
        options["original_max_position_embeddings"] = rng.choice([24, 64, positions])
    return options


def _gemma(rng: random.Random) -> Options:
    return _like_llama(rng) | {"head_dim": rng.choice([8, 16, 24])}


def _gemma2(rng: random.Random) -> Options:
    options = _gemma(rng) | _window(rng)
    options["hidden_activation"] = options.pop("hidden_act")
    caps = {"attn_logit_softcapping": rng.choice([None, 5.0]), "final_logit_softcapping": rng.choice([None, 30.0])}
    return options | caps | _types(rng, options, SLIDING) | {"query_pre_attn_scalar": rng.choice([8, 16, 24])}


def _gemma3(rng: random.Random) -> Options:
    options = _gemma2(rng) | {"sliding_window_pattern": rng.choice([2, 3, 6])}
    everywhere = options["rope_parameters"]
    nearby = {"rope_type": "default", "rope_theta": rng.choice([1000.0, 10000.0])}
    return options | {"rope_parameters": {FULL: everywhere, SLIDING: nearby}}


def _falcon(rng: random.Random) -> Options:
    alibi = _coin(rng)
    size = _size(rng, even=not alibi)
    new = _coin(rng)
    options = {
        **size,
        **_rope(rng, size),
        "alibi": alibi,
        "bias": _coin(rng),
        "multi_query": _coin(rng),
        "parallel_attn": new or _coin(rng),
        "new_decoder_architecture": new,
        "num_kv_heads": _kv(rng, size)["num_key_value_heads"] if new else None,
        "num_ln_in_parallel_attn": rng.choice([None, 1, 2]) if new else None,
        "activation": rng.choice(["gelu", "relu", "gelu_new"]),
    }
    return options | rng.choice([{}, {"ffn_hidden_size": 96}])


def _bloom(rng: random.Random) -> Options:
    size = _size(rng, even=False)
    kept = {key: size[key] for key in ("vocab_size", "hidden_size", "tie_word_embeddings", *TOKENS)}
    counts = {"n_layer": size["num_hidden_layers"], "n_head": size["num_attention_heads"]}
    return kept | counts | {"apply_residual_connection_post_layernorm": _coin(rng)}


def _opt(rng: random.Random) -> Options:
    size = _size(rng, even=False)
    return {
        **size,
        "ffn_dim": rng.choice([40, 128]),
        "do_layer_norm_before": _coin(rng),
        "_remove_final_layer_norm": _coin(rng, 0.2),
        "word_embed_proj_dim": rng.choice([None, size["hidden_size"], 24]),
        "activation_function": rng.choice(["relu", "gelu"]),
        "enable_bias": _coin(rng),
        "layer_norm_elementwise_affine": _coin(rng),
    }


def _gpt_neox(rng: random.Random) -> Options:
    size = _size(rng, even=False)
    options = {**size, **_rope(rng, size), **_wide(rng), "hidden_act": rng.choice(ACTIVATIONS)}
    return _partial(rng, options) | {"use_parallel_residual": _coin(rng), "attention_bias": _coin(rng)}


def _short_names(rng: random.Random) -> Options:
    size = _size(rng, even=False)
    names = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }
    options = {names.get(key, key): value for key, value in size.items()}
    inner = {"n_inner": rng.choice([None, 56]), "activation_function": rng.choice(ACTIVATIONS)}
    return options | inner | {"layer_norm_epsilon": rng.choice([1e-5, 1e-3])}


def _gptj(rng: random.Random) -> Options:
    options = _short_names(rng)
    dim = options["n_embd"] // options["n_head"]
    return options | {"rotary_dim": rng.choice(range(2, dim + 1, 2))}


def _gpt2(rng: random.Random) -> Options:
    return _short_names(rng) | {
        "scale_attn_weights": _coin(rng),
        "scale_attn_by_inverse_layer_idx": _coin(rng),
    }


def _bigcode(rng: random.Random) -> Options:
    return _short_names(rng) | {"multi_query": _coin(rng), "scale_attn_weights": _coin(rng)}


def _starcoder2(rng: random.Random) -> Options:
    options = _mistral(rng) | {"use_bias": _coin(rng), "norm_epsilon": rng.choice([1e-5, 1e-3])}
    return {key: value for key, value in options.items() if key not in ("rms_norm_eps", "attention_bias")}


def _stablelm(rng: random.Random) -> Options:
    size = _size(rng, even=False)
    options = {**size, **_kv(rng, size), **_rope(rng, size), **_wide(rng), "hidden_act": rng.choice(ACTIVATIONS)}
    switches = {key: _coin(rng) for key in ("use_qkv_bias", "qk_layernorm", "use_parallel_residual")}
    return _partial(rng, options) | switches


def _olmo(rng: random.Random) -> Options:
    options = _no_head_dim(rng) | {"clip_qkv": rng.choice([None, 0.7, 3.0])}
    options.pop("rms_norm_eps")
    return options


def _olmoe(rng: random.Random) -> Options:
    router = _router(rng)
    router["num_experts"] = router.pop("num_local_experts")
    clip = {"clip_qkv": rng.choice([None, 1.0]), "norm_topk_prob": _coin(rng)}
    return _no_head_dim(rng) | router | clip


def _granite(rng: random.Random) -> Options:
    return _no_head_dim(rng) | {
        "embedding_multiplier": rng.choice([1.0, 12.0]),
        "attention_multiplier": rng.choice([0.1, 0.3]),
        "residual_multiplier": rng.choice([1.0, 0.22]),
        "logits_scaling": rng.choice([1.0, 8.0]),
    }


def _granite_dense(rng: random.Random) -> Options:
    return _granite(rng) | {"mlp_bias": _coin(rng)}


def _granite_moe(rng: random.Random) -> Options:
    return _granite(rng) | _router(rng)


def _granite_shared(rng: random.Random) -> Options:
    return _granite_moe(rng) | {"shared_intermediate_size": rng.choice([0, 40])}


def _cohere(rng: random.Random) -> Options:
    options = _no_head_dim(rng)
    options["layer_norm_eps"] = options.pop("rms_norm_eps")
    return options | {"logit_scale": rng.choice([0.0625, 0.3]), "use_qk_norm": _coin(rng)}


def _cohere2(rng: random.Random) -> Options:
    options = _cohere(rng) | _window(rng)
    options.pop("use_qk_norm")
    return options | (_types(rng, options, SLIDING) or {"sliding_window_pattern": rng.choice([2, 4])})


def _smollm3(rng: random.Random) -> Options:
    options = _no_head_dim(rng) | {"mlp_bias": _coin(rng), "use_sliding_window": _coin(rng), **_window(rng)}
    count = options["num_hidden_layers"]
    turned = {"no_rope_layers": [rng.randint(0, 1) for _ in range(count)]} if _coin(rng) else {}
    return options | turned | {"no_rope_layer_interval": rng.choice([2, 4])}


def _llama4(rng: random.Random) -> Options:
    options = _like_llama(rng) | _router(rng) | {"head_dim": rng.choice([8, 16, 24])}
    options["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    count = options["num_hidden_layers"]
    some = {"moe_layers": [i for i in range(count) if _coin(rng)], "no_rope_layers": [1] + [0] * (count - 1)}
    return options | {
        "intermediate_size_mlp": rng.choice([40, 96]),
        "interleave_moe_layer_step": rng.choice([1, 2]),
        "use_qk_norm": _coin(rng),
        "no_rope_layer_interval": rng.choice([2, 4]),
        "attention_chunk_size": rng.choice([5, 16, 40, 500]),
        "attn_temperature_tuning": _coin(rng),
        "floor_scale": rng.choice([10, 50]),
        "attn_scale": rng.choice([0.1, 0.5]),
        **(some if _coin(rng) else {}),
    }


def _deepseek_v2(rng: random.Random) -> Options:
    options = _no_head_dim(rng)
    groups = rng.choice([1, 2, 4])
    for key in ("num_key_value_heads", "attention_bias"):
        options.pop(key)
    options["rope_parameters"] = rng.choice(
        [
            {"rope_type": "default", "rope_theta": 10000.0},
            {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7}
            | {"original_max_position_embeddings": 64},
        ]
    )
    return options | {
        "kv_lora_rank": rng.choice([8, 24]),
        "q_lora_rank": rng.choice([None, 20]),
        "qk_nope_head_dim": rng.choice([8, 16, 20]),
        "qk_rope_head_dim": rng.choice([4, 8, 16]),
        "v_head_dim": rng.choice([8, 12, 16]),
        "n_routed_experts": 8,
        "num_experts_per_tok": rng.choice([1, 2]),
        "n_shared_experts": rng.choice([1, 2]),
        "moe_intermediate_size": rng.choice([24, 40]),
        "first_k_dense_replace": rng.choice([0, 1]),
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "topk_method": rng.choice(["greedy", "group_limited_greedy"]),
        "n_group": groups,
        "topk_group": rng.randint(1, groups),
        "attention_bias": _coin(rng),
    }


def _deepseek_v3(rng: random.Random) -> Options:
    options = _deepseek_v2(rng) | {"norm_topk_prob": _coin(rng), "rope_interleave": _coin(rng)}
    options.pop("topk_method")
    return options


RANDOM: dict[str, Callable[[random.Random], Options]] = {
    "llama": _llama,
    "llama4_text": _llama4,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "phi": _phi,
    "phi3": _phi3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "falcon": _falcon,
    "bloom": _bloom,
    "opt": _opt,
    "gpt_neox": _gpt_neox,
    "gptj": _gptj,
    "gpt2": _gpt2,
    "gpt_bigcode": _bigcode,
    "starcoder2": _starcoder2,
    "stablelm": _stablelm,
    "olmo": _olmo,
    "olmo2": _no_head_dim,
    "olmoe": _olmoe,
    "granite": _granite_dense,
    "granitemoe": _granite_moe,
    "granitemoeshared": _granite_shared,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "smollm3": _smollm3,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}
