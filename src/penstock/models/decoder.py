"""The decoder: one forward pass for every decoder-only family that a DecoderConfig describes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from penstock.formats import FORMATS, Format
from penstock.formats.dense import Linear
from penstock.hub.checkpoint import TensorEntry
from penstock.kernels.rotary import RopeConfig, Rotary
from penstock.models.adapted import adapted
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.experts import Experts
from penstock.models.fused import fused
from penstock.models.inputs import KVCache, StepInputs, cache_on, empty_cache
from penstock.models.mlp import Mlp
from penstock.models.norms import Norm
from penstock.models.tensors import CPU
from penstock.models.weights import DecoderWeights, LayerWeights, load_decoder


class Decoder:
    """Weights and the arithmetic over them. Holds no state between steps: the cache comes as an argument."""

    def __init__(self, config: DecoderConfig, weights: DecoderWeights, dtype: torch.dtype, positions: int) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        ropes = list(dict.fromkeys(config.ropes))
        self.device = weights.embedding.device
        self._rotaries = [
            Rotary(rope, config.head_width, config.head_dim, positions, dtype, self.device) for rope in ropes
        ]
        self._layers = [fused(layer, config) for layer in weights.layers]
        self._turn_of = [ropes.index(rope) for rope in config.ropes]  # for each layer
        self._multiplier = float(torch.tensor(config.embedding_multiplier, dtype=dtype))

    @classmethod
    def load(
        cls,
        entries: dict[str, TensorEntry] | None,
        config: DecoderConfig,
        names: WeightMap,
        dtype: torch.dtype,
        positions: int,
        form: Format = FORMATS["none"],
        device: torch.device = CPU,
    ) -> Decoder:
        """Read the tensors of a checkpoint; without entries take random ones.

        positions: the longest context that will be asked for. device: where the weights will be.
        """
        return cls(config, load_decoder(entries, config, names, dtype, form, positions, device), dtype, positions)

    def take(self, layers: list[LayerWeights]) -> None:
        """Compute with these layers from now on."""
        self.weights.layers[:] = layers
        self._layers = [fused(layer, self.config) for layer in layers]

    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache beside the weights, of their type unless `dtype` says another."""
        shape = (num_blocks, self.config.num_kv_heads, block_size, self.config.head_width)
        dtype = dtype or self.dtype
        if self.device.type != "cpu" or dtype not in (self.dtype, torch.int8):
            return cache_on(self.device, self.config.num_layers, shape, dtype)
        return empty_cache(self.config.num_layers, shape, dtype)

    @property
    def flows(self) -> bool:
        """Whether a step of decoding never asks the host: a mixture of experts does where its matrices are not stacked,
        as in float32."""
        mixtures = [layer.mlp for layer in self.weights.layers if isinstance(layer.mlp, Experts)]
        return all(mixture.stacked is not None for mixture in mixtures)

    @property
    def span_rope(self) -> RopeConfig | None:
        """The rotation whose angles depend on more than the position, if any."""
        return self.config.span_rope

    def forward(self, step: StepInputs, cache: KVCache, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """One step over a flat batch of runs; writes the cache. Returns [R, hidden], before the final norm, of the rows
        that are wanted, in their order. watch: is shown each layer's number and what goes into it, [T, hidden], and at
        last, under the number of layers, what the output matrix is given; all rows are then wanted."""
        places = step.positions if step.axes is None else step.axes
        turns = [rotary(places, step.spans) for rotary in self._rotaries]
        x = self._embed(step)
        last = len(self._layers) - 1
        for i, layer in enumerate(self._layers):
            if watch is not None:
                watch(i, x)
            wanted = step.wanted if i == last else None
            if step.adapters is not None:
                layer = adapted(self.weights.layers[i], i, step.adapters, wanted)
            h = x if layer.attention_norm is None else layer.attention_norm(x)
            mixed = layer.attention(h, turns[self._turn_of[i]], step, wanted, cache[i])
            if len(mixed) == 0:  # the middle of a prompt: keys and values were all
                return x[:0]
            if wanted is not None:
                x, h = x[wanted.rows], h[wanted.rows]
            x = self._residual(layer, x, h, mixed)
        if watch is not None:
            watch(len(self.weights.layers), self._normed(x))
        return x

    def _embed(self, step: StepInputs) -> Tensor:
        """What goes into the first layer. [T, hidden]"""
        w = self.weights
        x = w.embedding[step.ids]
        if w.project_in is not None:
            x = w.project_in(x)
        if self._multiplier != 1:
            x.mul_(self._multiplier)
        if step.images is not None:
            x[step.images.rows] = step.images.features
        if w.positions is not None:
            x.add_(w.positions[step.positions])
        return x if w.embedding_norm is None else w.embedding_norm(x)

    def _residual(self, layer: LayerWeights, x: Tensor, h: Tensor, mixed: Tensor) -> Tensor:
        """The rest of a layer: the results of attention and MLP join the residual stream.

        x: what the layer was given; h: its norm, which attention was given; mixed: what came out of attention.
        """
        normed, many = self.config.residual_normed, self.config.residual_multiplier
        if self.config.parallel:  # both parts see the input of the layer
            inside = h if layer.mlp_norm is None else layer.mlp_norm(x)
            x = _add(layer.out, mixed, x, layer.attention_out_norm, many)
            return _add(layer.mlp, inside, x, layer.mlp_out_norm, many)
        x = _add(layer.out, mixed, h if normed else x, layer.attention_out_norm, many)
        if layer.attention_sum_norm is not None:
            x = layer.attention_sum_norm(x)
        h = x if layer.mlp_norm is None else layer.mlp_norm(x)
        x = _add(layer.mlp, h, h if normed else x, layer.mlp_out_norm, many)
        return x if layer.mlp_sum_norm is None else layer.mlp_sum_norm(x)

    def _normed(self, hidden: Tensor) -> Tensor:
        """What the output matrix multiplies. hidden: [n, hidden] from `forward` -> [n, hidden or embedding_size]."""
        w = self.weights
        x = hidden if w.final_norm is None else w.final_norm(hidden)
        return x if w.project_out is None else w.project_out(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token of the vocabulary. hidden: [n, hidden] from `forward` -> [n, vocab]."""
        scores = self.weights.head(self._normed(hidden))
        if self.config.logit_multiplier != 1:
            scores.mul_(self.config.logit_multiplier)
        cap = self.config.logit_softcap
        return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def _add(part: Linear | Mlp, h: Tensor, x: Tensor, norm: Norm | None, multiplier: float) -> Tensor:
    """x + multiplier * norm(part(h)), in one go where the part can."""
    if norm is None and multiplier == 1:
        return part(h, x)
    y = part(h)
    return torch.add(x, y if norm is None else norm(y), alpha=multiplier)
