"""Configurations of architectures that no family describes: they run through transformers."""

from __future__ import annotations

from tests.families import Options

_TOKENS: Options = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "vocab_size": 512}
_BASE: Options = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    **_TOKENS,
}
_GROUPED: Options = {**_BASE, "num_key_value_heads": 2}
_HEADS: Options = {**_GROUPED, "head_dim": 16}

# attention that transformers calls through its interface: ours, over our paged cache
PAGED: dict[str, Options] = {
    "nemotron": {"model_type": "nemotron", **_GROUPED},
    "persimmon": {"model_type": "persimmon", **_BASE},
    "glm": {"model_type": "glm", **_HEADS},
    "helium": {"model_type": "helium", **_HEADS},
    "biogpt": {"model_type": "biogpt", **_BASE},
    "ctrl": {"model_type": "ctrl", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "dff": 96, **_TOKENS},
    "exaone4": {"model_type": "exaone4", "sliding_window": 20, "sliding_window_pattern": 2, **_GROUPED},
    "phi-3.5-moe": {"model_type": "phimoe", "num_local_experts": 4, "sliding_window": 24, **_GROUPED},
    "minicpm3": {
        "model_type": "minicpm3",
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        **_BASE,
    },
}

# those that keep a memory of their own
OWN: dict[str, Options] = {
    "mamba": {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 3, "state_size": 8, **_TOKENS},
    "rwkv": {
        "model_type": "rwkv",
        "hidden_size": 64,
        "attention_hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "context_length": 512,
        **_TOKENS,
    },
    "jamba": {
        "model_type": "jamba",
        "num_experts": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        **_GROUPED,
    },
    "xglm": {"model_type": "xglm", "d_model": 64, "ffn_dim": 96, "num_layers": 3, "attention_heads": 4,
             "max_position_embeddings": 512, **_TOKENS},
    "codegen": {"model_type": "codegen", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "n_ctx": 512,
                "rotary_dim": 8, **_TOKENS},
    "mpt": {"model_type": "mpt", "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 512, **_TOKENS},
    "gpt-neo": {"model_type": "gpt_neo", "hidden_size": 64, "num_layers": 2, "num_heads": 4, "window_size": 16,
                "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 512, **_TOKENS},
    "recurrent-gemma": {"model_type": "recurrent_gemma", "lru_width": 64, "attention_window_size": 24,
                        "block_types": ["recurrent", "attention"], **{**_BASE, "num_key_value_heads": 1}},
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention", "conv"], **_GROUPED},
    "gpt-oss": {"model_type": "gpt_oss", "num_local_experts": 4, "sliding_window": 20,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, **_HEADS},
}  # fmt: skip

OTHERS = PAGED | OWN
