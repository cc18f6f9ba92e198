"""What the engine asks of a model, whoever computes it: a decoder, an encoder and a decoder, transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from penstock.kernels.rotary import RopeConfig
from penstock.models.inputs import KVCache, StepInputs


class Model(Protocol):
    """A model that computes steps over a cache of blocks."""

    @property
    def device(self) -> torch.device:
        """Where the tensors of a step are to be."""
        ...

    @property
    def span_rope(self) -> RopeConfig | None:
        """The rotation whose angles depend on more than the position (see RopeConfig.span_limit), if any."""
        ...

    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache of so many blocks, of the model's type unless `dtype` says another."""
        ...

    def forward(self, step: StepInputs, cache: KVCache, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """One step over a flat batch of runs; writes the cache. Returns a row for each that is wanted, in their order:
        what `logits` takes.

        watch: is shown the step's hidden states, [T, hidden] each: 0 is what goes into the first layer (of the encoder
        where there is one), i what comes out of the i-th, the last of them behind the final norm.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token of the vocabulary. hidden: n rows of `forward` -> [n, vocab]."""
        ...
