"""The decoder: one forward pass for every decoder-only family that a DecoderConfig describes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.devices.cpu import zeros_on_demand
from penstock.formats import FORMATS, Format
from penstock.hub.checkpoint import TensorEntry
from penstock.kernels.attention import RunGroup, paged_attention, rotate_into_cache
from penstock.kernels.norms import rms_norm
from penstock.kernels.rotary import Rotary
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.weights import DecoderWeights, LayerWeights, load_decoder

KVCache = list[tuple[Tensor, Tensor]]  # per layer keys and values, [kv_heads, blocks, block_size, head_dim]


@dataclass(frozen=True)
class Wanted:
    """The rows of a step whose result is needed, and how they attend as runs of length 1, in the same order."""

    rows: Tensor  # [R] int64
    groups: list[RunGroup]


@dataclass(frozen=True)
class StepInputs:
    """What one step computes: a flat batch of T tokens, run after run.

    ids, positions: [T] each token and its place in its sequence. spans: [T] or None, see Rotary. slots: [T] where its
    key and value go in the cache. groups: the cached blocks that each run attends to, in the order of the rows. wanted:
    None where every row is. A prompt's other rows are there for their keys and values alone, so the last layer does
    nothing else for them.
    """

    ids: Tensor
    positions: Tensor
    spans: Tensor | None
    slots: Tensor
    groups: list[RunGroup]
    wanted: Wanted | None = None


class Decoder:
    """Weights and the arithmetic over them. Holds no state between steps: the cache comes as an argument."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, dtype: torch.dtype, positions: int) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        self.rotary = Rotary(config.rope, config.head_dim, positions, dtype)

    @classmethod
    def load(
        cls,
        entries: dict[str, TensorEntry] | None,
        config: DecoderConfig,
        names: WeightMap,
        dtype: torch.dtype,
        positions: int,
        form: Format = FORMATS["none"],
    ) -> Decoder:
        """Read the tensors of a checkpoint; without entries take random ones. positions: the longest context that
        will be asked for."""
        return cls(config, load_decoder(entries, config, names, dtype, form), dtype, positions)

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """An empty cache. Zeroed, because stale infinities would poison the padding of attention."""
        shape = (self.config.num_kv_heads, num_blocks, block_size, self.config.head_dim)
        return [
            (zeros_on_demand(shape, self.dtype, huge=True), zeros_on_demand(shape, self.dtype, huge=True))
            for _ in range(self.config.num_layers)
        ]

    def forward(self, step: StepInputs, cache: KVCache) -> Tensor:
        """One step over a flat batch of runs; writes the cache. Returns [R, hidden], before the final norm, of the rows
        that are wanted, in their order."""
        cos, sin = self.rotary(step.positions, step.spans)
        x = self.weights.embedding[step.ids]
        last = len(self.weights.layers) - 1
        for i, layer in enumerate(self.weights.layers):
            wanted = step.wanted if i == last else None
            h = rms_norm(x, layer.attention_norm, self.config.norm_eps)
            h = self._attention(layer, self.config.windows[i], h, cos, sin, step, wanted, cache[i])
            if len(h) == 0:  # the middle of a prompt: keys and values were all
                return x[:0]
            x = layer.out(h, x if wanted is None else x[wanted.rows])
            h = rms_norm(x, layer.mlp_norm, self.config.norm_eps)
            x = layer.down(layer.gate_up(h), x)
        return x

    def _attention(
        self,
        layer: LayerWeights,
        window: int | None,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        step: StepInputs,
        wanted: Wanted | None,
        kv: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Self-attention of one layer, before its output projection. h: [T, hidden] -> [T or R, heads * head_dim]."""
        c = self.config
        qkv = layer.qkv(h).view(len(h), -1, c.head_dim)  # [T, heads + 2 kv_heads, dim]
        q, k, v = qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, c.norm_eps), rms_norm(k, layer.k_norm, c.norm_eps)
        q = rotate_into_cache(q, k, v, cos, sin, step.slots, *kv)
        groups = step.groups
        if wanted is not None:
            q, groups = q[wanted.rows], wanted.groups
        return paged_attention(q, *kv, groups, c.scale, window)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token of the vocabulary. hidden: [n, hidden] from `forward` -> [n, vocab]."""
        return self.weights.head(rms_norm(hidden, self.weights.final_norm, self.config.norm_eps))
