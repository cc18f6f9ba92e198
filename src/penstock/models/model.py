"""What the engine's steps run: a decoder, or an encoder and a decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from penstock.kernels.rotary import RopeConfig
from penstock.models.inputs import KVCache, StepInputs


class Model(Protocol):
    """Weights and the arithmetic over them, without any state between steps."""

    @property
    def span_rope(self) -> RopeConfig | None:
        """The rotation whose angles depend on more than the position (see RopeConfig.span_limit), if any."""
        ...

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """An empty cache."""
        ...

    def forward(self, step: StepInputs, cache: KVCache, watch: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """One step over a flat batch of runs; writes the cache. Returns the rows that are wanted, [R, hidden], before
        the final norm. watch: is shown each layer's number and what goes into it."""
        ...

    def normed(self, hidden: Tensor) -> Tensor:
        """What the output matrix multiplies. hidden: [n, hidden] from `forward`."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token of the vocabulary. hidden: [n, hidden] from `forward` -> [n, vocab]."""
        ...
