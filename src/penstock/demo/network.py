"""The network that is trained: a plain Llama decoder whose parameter names are those of the checkpoint."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of the network; `vocabulary` is what the tokenizer turned out to have."""

    vocabulary: int
    hidden: int = 256
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    intermediate: int = 768
    positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def config(self) -> dict[str, object]:
        """The config.json that describes this network to every Llama implementation."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_size,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "use_cache": True,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 2,
        }


class Norm(nn.Module):
    """Root mean square norm, computed in float32 as the inference engines do."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions in the two-halves layout; x is [batch, heads, length, head_size]."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Grouped-query attention over one window."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_size, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_size, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        s = self.shape
        q = self.q_proj(x).view(batch, length, s.heads, s.head_size).transpose(1, 2)
        k = self.k_proj(x).view(batch, length, s.kv_heads, s.head_size).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, s.kv_heads, s.head_size).transpose(1, 2)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        group = s.heads // s.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        y = attend(q, k, v, mask)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int = 128) -> Tensor:
    """Causal attention by blocks of queries, each against the keys up to its end.

    On a CPU, forward and backward together take less than half the time of torch's own kernel at this size.
    """
    q = q * q.shape[-1] ** -0.5
    parts = []
    for start in range(0, q.shape[2], block):
        stop = min(start + block, q.shape[2])
        scores = q[:, :, start:stop] @ k[:, :, :stop].transpose(-1, -2) + mask[:, :, start:stop, :stop]
        parts.append(scores.softmax(-1) @ v[:, :, :stop])
    return torch.cat(parts, dim=2)


def causal_mask(ids: Tensor, begin: int | None, dtype: torch.dtype) -> Tensor:
    """What each token may not see, as minus infinity, [batch or 1, 1, length, length].

    With `begin`, the id that begins a document, a token sees its own document only.
    """
    length = ids.shape[1]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None]
    if begin is not None:
        document = (ids == begin).cumsum(1)
        hidden = hidden | (document[:, :, None] != document[:, None, :])
    return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None]


class Feed(nn.Module):
    """The gated feed-forward half of a layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.norm_eps)
        self.mlp = Feed(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Trunk(nn.Module):
    """Embedding, layers and final norm: what a checkpoint calls `model`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.norm_eps)


class Network(nn.Module):
    """The language model; the head is the transposed embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Trunk(shape)
        deep = 0.02 / (2 * shape.layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02)

    def forward(self, ids: Tensor, begin: int | None = None, wanted: Tensor | None = None) -> Tensor:
        """Token ids [batch, length] to logits, [batch, length, vocabulary] or those of the `wanted` tokens only.

        `wanted` is a mask [batch, length]; `begin` keeps documents in one window apart.
        """
        x = self.model.embed_tokens(ids)
        cos, sin = angles(self.shape, ids.shape[1], x.dtype)
        mask = causal_mask(ids, begin, x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask)
        if wanted is not None:
            x = x[wanted]
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def angles(shape: Shape, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary positions, each [length, head_size / 2]."""
    steps = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
    phase = torch.outer(torch.arange(length, dtype=torch.float32), shape.rope_theta**-steps)
    return phase.cos().to(dtype), phase.sin().to(dtype)
