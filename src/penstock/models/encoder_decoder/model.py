"""The two stacks: what the engine's steps run, as `Decoder` is for models without an encoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from penstock.formats import FORMATS, Format
from penstock.hub.checkpoint import TensorEntry
from penstock.kernels.attention import RunGroup, paged_attention, store
from penstock.kernels.relative import attend_within, paged_relative_attention, spread
from penstock.models.encoder_decoder.config import EncoderDecoderConfig
from penstock.models.encoder_decoder.weights import EncoderDecoderWeights, load_encoder_decoder
from penstock.models.inputs import EncoderInputs, KVCache, StepInputs, cache_on, empty_cache
from penstock.models.tensors import CPU


class EncoderDecoder:
    """Weights and the arithmetic over them. Holds no state between steps: the cache comes as an argument."""

    span_rope = None

    def __init__(self, config: EncoderDecoderConfig, weights: EncoderDecoderWeights, dtype: torch.dtype) -> None:
        self.config, self.weights, self.dtype = config, weights, dtype
        self.device = weights.embedding.device

    @classmethod
    def load(
        cls,
        entries: dict[str, TensorEntry] | None,
        config: EncoderDecoderConfig,
        dtype: torch.dtype,
        positions: int,
        form: Format = FORMATS["none"],
        device: torch.device = CPU,
    ) -> EncoderDecoder:
        """Read the tensors of a checkpoint; without entries take random ones.

        positions: of the longest answer that will be asked for. device: where the weights will be.
        """
        return cls(config, load_encoder_decoder(entries, config, dtype, form, positions, device), dtype)

    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for the layers of the decoder: of what the encoder made, and of their own tokens. dtype: other
        than the weights'."""
        c = self.config
        shape = (num_blocks, c.num_heads, block_size, c.head_dim)
        if self.device.type != "cpu":
            return cache_on(self.device, c.decoder_layers, shape, dtype or self.dtype)
        return empty_cache(c.decoder_layers, shape, dtype or self.dtype)

    def forward(self, step: StepInputs, cache: KVCache, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """One step; writes the cache. Returns [T, hidden] of the decoder's tokens, before the final norm.

        watch: is shown what goes into each layer of the encoder, [texts' tokens, hidden], and under the number behind
        the last what comes out of it.
        """
        texts = step.encoder
        assert texts is not None  # noqa: S101 (the step was built for this model)
        if len(texts.ids):
            encoded = self._encode(texts, watch)
            if texts.slots is not None:
                for layer, kv in zip(self.weights.decoder, cache, strict=True):
                    k, v = self._heads(layer.cross.kv(encoded), 2)
                    store(k, v, texts.slots, *kv)
        x = self.weights.embedding[step.ids]
        return self._decode(x, step, texts, cache) if len(x) else x

    def _encode(self, texts: EncoderInputs, watch: Callable[[int, Tensor], None] | None) -> Tensor:
        """The states of the texts behind the final norm. [texts' tokens, hidden]"""
        x = self.weights.embedding[texts.ids]
        longest = max(group.length for group in texts.groups)
        table = bias = None
        for i, layer in enumerate(self.weights.encoder):
            if watch is not None:
                watch(i, x)
            attention = layer.attention
            if bias is None or table is not layer.bias:
                table, bias = layer.bias, spread(layer.bias, longest)
            q, k, v = self._heads(attention.qkv(attention.norm(x)), 3)
            x = attention.out(attend_within(q, k, v, texts.groups, bias), x)
            x = layer.feed_forward.mlp(layer.feed_forward.norm(x), x)
        x = self.weights.encoder_norm(x)
        if watch is not None:
            watch(len(self.weights.encoder), x)
        return x

    def _decode(self, x: Tensor, step: StepInputs, texts: EncoderInputs, cache: KVCache) -> Tensor:
        groups = cast(list[RunGroup], step.groups)
        for layer, kv in zip(self.weights.decoder, cache, strict=True):
            attention, cross = layer.attention, layer.cross
            q, k, v = self._heads(attention.qkv(attention.norm(x)), 3)
            store(k, v, step.slots, *kv)
            mixed = paged_relative_attention(q.contiguous(), *kv, groups, layer.bias)
            x = attention.out(mixed, x)
            (q,) = self._heads(cross.q(cross.norm(x)), 1)
            x = cross.out(paged_attention(q, *kv, texts.crosses, 1.0, None), x)
            x = layer.feed_forward.mlp(layer.feed_forward.norm(x), x)
        return x

    def _heads(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """[T, parts * heads * dim] -> `parts` of [T, heads, dim]"""
        return x.view(len(x), parts, self.config.num_heads, self.config.head_dim).unbind(1)

    def _normed(self, hidden: Tensor) -> Tensor:
        """What the output matrix multiplies. hidden: [n, hidden] from `forward`."""
        x = self.weights.decoder_norm(hidden)
        return x * self.config.hidden_size**-0.5 if self.config.scaled_head else x

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token of the vocabulary. hidden: [n, hidden] from `forward` -> [n, vocab]."""
        return self.weights.head(self._normed(hidden))
