"""What the layers of each family hold, by the `model_type` of config.json.

A rule is a fixed yes or no, or the name of the config's own flag; `name=yes` is a flag that is set unless the config
says otherwise. Sources: the families' papers and config.json files; tests compare every count with transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Rule = bool | str


@dataclass(frozen=True)
class Family:
    """How a family's layers differ from a plain Llama.

    gated: the MLP has three matrices instead of two; inner: the MLP's width as a multiple of the model's where the
    config does not say it. norms: a layer's norms, one instead where the flag `parallel` is set. kv_heads, head_dim:
    where the config leaves them out (0: as many as heads, width / heads). multi_query: the flag for one kv head.
    qk_norm: norms of queries and keys: `head` of one head's width, `head+bias` with a bias, `all` of all heads' width.
    experts, shared: the config's names for the number of experts and the width of what every token passes.
    """

    gated: bool = True
    inner: int = 4
    norms: int = 2
    parallel: str = ""
    norm_weight: Rule = True
    norm_bias: Rule = False
    final_norm: Rule = True
    embedding_norm: int = 0
    qkv_bias: Rule = "attention_bias"
    out_bias: Rule = "attention_bias"
    mlp_bias: Rule = "mlp_bias"
    head_bias: Rule = False
    qk_norm: str = ""
    qk_norm_flag: Rule = True
    kv_heads: int = 0
    head_dim: int = 0
    multi_query: str = ""
    learned_positions: int = 0
    position_offset: int = 0
    experts: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    shared_gate: bool = False
    tied: Rule = "tie_word_embeddings"


LLAMA = Family()
PLAIN = Family(gated=False, norm_bias=True, qkv_bias=True, out_bias=True, mlp_bias=True, tied="tie_word_embeddings=yes")
MISTRAL = replace(LLAMA, kv_heads=8, qkv_bias=False, out_bias=False, mlp_bias=False)
QWEN2 = replace(LLAMA, qkv_bias=True, out_bias=False, mlp_bias=False)
QWEN3 = replace(LLAMA, qk_norm="head", head_dim=128, mlp_bias=False)
GEMMA = replace(LLAMA, head_dim=256, mlp_bias=False, tied="tie_word_embeddings=yes")
COHERE = replace(
    LLAMA, norms=1, mlp_bias=False, qk_norm="all", qk_norm_flag="use_qk_norm", tied="tie_word_embeddings=yes"
)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "llama4_text": replace(
        LLAMA, mlp_bias=False, experts=("num_local_experts",), shared=("intermediate_size",), kv_heads=8
    ),
    "smollm3": replace(LLAMA, tied="tie_word_embeddings=yes", kv_heads=4),
    "mistral": MISTRAL,
    "ministral": MISTRAL,
    "mixtral": replace(MISTRAL, experts=("num_local_experts",)),
    "qwen2": QWEN2,
    "qwen2_moe": replace(
        QWEN2, experts=("num_experts",), shared=("shared_expert_intermediate_size",), shared_gate=True
    ),
    "qwen3": QWEN3,
    "qwen3_moe": replace(QWEN3, head_dim=0, experts=("num_experts", "num_local_experts")),
    "phi": replace(
        PLAIN, norms=1, head_bias=True, qk_norm="head+bias", qk_norm_flag="qk_layernorm", tied="tie_word_embeddings"
    ),
    "phi3": replace(LLAMA, qkv_bias=False, out_bias=False, mlp_bias=False),
    "phimoe": replace(LLAMA, norm_bias=True, mlp_bias=False, head_bias="lm_head_bias", experts=("num_local_experts",)),
    "gemma": GEMMA,
    "gemma2": replace(GEMMA, norms=4),
    "gemma3_text": replace(GEMMA, norms=4, qk_norm="head"),
    "falcon": replace(
        PLAIN,
        qkv_bias="bias",
        out_bias="bias",
        mlp_bias="bias",
        multi_query="multi_query=yes",
        parallel="parallel_attn=yes",
    ),
    "bloom": replace(PLAIN, embedding_norm=1),
    "opt": replace(
        PLAIN,
        norm_weight="layer_norm_elementwise_affine=yes",
        norm_bias="layer_norm_elementwise_affine=yes",
        final_norm="do_layer_norm_before=yes",
        qkv_bias="enable_bias=yes",
        out_bias="enable_bias=yes",
        mlp_bias="enable_bias=yes",
        learned_positions=1,
        position_offset=2,
    ),
    "gpt_neox": replace(
        PLAIN, qkv_bias="attention_bias=yes", out_bias="attention_bias=yes", tied="tie_word_embeddings"
    ),
    "gptj": replace(PLAIN, norms=1, qkv_bias=False, out_bias=False, head_bias=True, tied="tie_word_embeddings"),
    "gpt2": replace(PLAIN, learned_positions=1),
    "gpt_bigcode": replace(PLAIN, learned_positions=1, multi_query="multi_query=yes"),
    "starcoder2": replace(PLAIN, kv_heads=2, qkv_bias="use_bias=yes", out_bias="use_bias=yes", mlp_bias="use_bias=yes"),
    "stablelm": replace(
        LLAMA,
        norm_bias=True,
        parallel="use_parallel_residual",
        qkv_bias="use_qkv_bias",
        out_bias=False,
        mlp_bias=False,
        qk_norm="all",
        qk_norm_flag="qk_layernorm",
    ),
    "olmo": replace(LLAMA, norm_weight=False, mlp_bias=False),
    "olmo2": replace(LLAMA, qk_norm="all", mlp_bias=False),
    "olmo3": replace(LLAMA, qk_norm="all", mlp_bias=False),
    "olmoe": replace(LLAMA, qk_norm="all", mlp_bias=False, experts=("num_experts",)),
    "granite": LLAMA,
    "granitemoe": replace(LLAMA, mlp_bias=False, experts=("num_local_experts",)),
    "granitemoeshared": replace(
        LLAMA, mlp_bias=False, experts=("num_local_experts",), shared=("shared_intermediate_size",)
    ),
    "cohere": COHERE,
    "cohere2": replace(COHERE, qk_norm=""),
}
