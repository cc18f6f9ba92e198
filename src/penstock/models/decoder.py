"""The decoder: one forward pass for every decoder-only family that a DecoderConfig describes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from penstock.devices.cpu import zeros_on_demand
from penstock.formats.dense import linear
from penstock.kernels.attention import RunGroup, paged_attention, write_kv
from penstock.kernels.norms import activation_and_mul, rms_norm
from penstock.kernels.rotary import Rotary, rotate
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.weights import DecoderWeights, LayerWeights, load_decoder

KVCache = list[tuple[Tensor, Tensor]]  # per layer keys and values, [kv_heads, blocks, block_size, head_dim]


class Decoder:
    """Weights and the arithmetic over them. Holds no state between steps: the cache comes as an argument."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, dtype: torch.dtype, positions: int) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        self.rotary = Rotary(config.rope, config.head_dim, positions, dtype)

    @classmethod
    def load(cls, folder: Path, config: DecoderConfig, names: WeightMap, dtype: torch.dtype, positions: int) -> Decoder:
        """Read a checkpoint. positions: the longest context that will be asked for."""
        return cls(config, load_decoder(folder, config, names, dtype), dtype, positions)

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """An empty cache. Zeroed, because stale infinities would poison the padding of attention."""
        shape = (self.config.num_kv_heads, num_blocks, block_size, self.config.head_dim)
        return [
            (zeros_on_demand(shape, self.dtype), zeros_on_demand(shape, self.dtype))
            for _ in range(self.config.num_layers)
        ]

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        spans: Tensor | None,
        slots: Tensor,
        groups: list[RunGroup],
        cache: KVCache,
    ) -> Tensor:
        """One step over a flat batch of runs: [T] token ids -> [T, hidden], before the final norm.

        positions: [T] place of each token in its sequence; spans: see Rotary; slots: [T] where its key and value go;
        groups: which cached blocks each run attends to.
        """
        cos, sin = self.rotary(positions, spans)
        x = self.weights.embedding[ids]
        for layer, window, (k_cache, v_cache) in zip(self.weights.layers, self.config.windows, cache, strict=True):
            h = rms_norm(x, layer.attention_norm, self.config.norm_eps)
            x = x + self._attention(layer, window, h, cos, sin, slots, groups, k_cache, v_cache)
            h = rms_norm(x, layer.mlp_norm, self.config.norm_eps)
            h = activation_and_mul(linear(h, layer.gate_up), self.config.activation)
            x = x + linear(h, layer.down)
        return x

    def _attention(
        self,
        layer: LayerWeights,
        window: int | None,
        h: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        groups: list[RunGroup],
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        c = self.config
        qkv = linear(h, layer.qkv).view(len(h), -1, c.head_dim)  # [T, heads + 2 kv_heads, dim]
        q, k, v = qkv.split((c.num_heads, c.num_kv_heads, c.num_kv_heads), dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = rms_norm(q, layer.q_norm, c.norm_eps), rms_norm(k, layer.k_norm, c.norm_eps)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        write_kv(k_cache, slots, k)
        write_kv(v_cache, slots, v)
        return linear(paged_attention(q, k_cache, v_cache, groups, c.scale, window), layer.out)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token of the vocabulary. hidden: [n, hidden] from `forward` -> [n, vocab]."""
        return linear(rms_norm(hidden, self.weights.final_norm, self.config.norm_eps), self.weights.head)
