"""The tensors of a GGUF model under their Hugging Face names."""

from __future__ import annotations

import re

from penstock.hub.checkpoint import TensorEntry
from penstock.hub.folder import damaged
from penstock.hub.gguf.file import GgufModel

_GLOBAL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA_2_LAYER = {  # a norm before and behind each half of a layer
    **_LAYER,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NOT_WEIGHTS = re.compile(r"rope_freqs\.weight|blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight")  # part of the config
_IN_LAYER = re.compile(r"blk\.(?P<layer>\d{1,4})\.(?P<part>\w+)\.(?P<kind>weight|bias)")


def entries_of(model: GgufModel) -> dict[str, TensorEntry]:
    """Every weight of the model by its Hugging Face name, with what its values need on reading.

    llama.cpp keeps the rows of Llama's q and k in another order, and Gemma's norm weights with the 1 that the
    arithmetic adds. Raises ModelError for a tensor that these families do not have.
    """
    family = str(model.metadata.get("general.architecture"))
    layer_names = _GEMMA_2_LAYER if family in ("gemma2", "gemma3") else _LAYER
    heads = {"attn_q": "attention.head_count", "attn_k": "attention.head_count_kv"} if family == "llama" else {}
    found: dict[str, TensorEntry] = {}
    for name, tensor in model.tensors.items():
        if _NOT_WEIGHTS.fullmatch(name):
            continue
        stem, _, kind = name.rpartition(".")
        match = _IN_LAYER.fullmatch(name)
        part = match["part"] if match else stem
        if match and part in layer_names:
            ours = f"model.layers.{int(match['layer'])}.{layer_names[part]}.{kind}"
        elif part in _GLOBAL and kind in ("weight", "bias"):
            ours = f"{_GLOBAL[part]}.{kind}"
        else:
            raise damaged(tensor.file, f"It has the tensor {name!r}, which a {family[:40]} model has not.")
        pairs = 0
        if part in heads:
            count = model.metadata.get(f"{family}.{heads[part]}", model.metadata.get(f"{family}.attention.head_count"))
            pairs = count if isinstance(count, int) else 0
            if pairs < 1 or tensor.shape[0] % (2 * pairs):
                raise damaged(tensor.file, f"Tensor {name!r} does not have the rows of {pairs} heads.")
        shift = -1.0 if family.startswith("gemma") and part.endswith("norm") else 0.0
        found[ours] = TensorEntry(ours, tensor.file, tensor.kind, tensor.shape, tensor.start, tensor.end, pairs, shift)
    return found
