"""Paged attention in plain torch: runs of any length over a cache of blocks.

The cache of one layer is two tensors [kv_heads, blocks, block_size, head_dim]: with the heads outermost, the blocks of
one sequence gather into a matrix per head by copying whole blocks, and grouped query heads multiply it without being
repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

QUERY_ROWS = 256  # queries of a run that are scored together; a later chunk's keys are never touched by an earlier one


@dataclass
class RunGroup:
    """Runs of one length, so that they multiply as one batch.

    rows: where the group's tokens lie in the step, [start, start + batch * length). blocks: [batch, n] block ids,
    padded with 0. contexts: tokens that the last token of each run sees, itself included.
    """

    start: int
    length: int
    contexts: list[int]
    blocks: Tensor
    masks: dict[tuple[int | None, int, int], Tensor | None] = field(default_factory=dict)  # made on first use

    @property
    def batch(self) -> int:
        return len(self.contexts)

    @property
    def end(self) -> int:
        return self.start + self.batch * self.length

    def mask(
        self, window: int | None, repeats: int, dtype: torch.dtype, first: int, stop: int, width: int
    ) -> Tensor | None:
        """What to add to the scores of queries first..stop: 0 where a query sees a key, -inf elsewhere, None if all.

        [1, batch, repeats * (stop - first), width]: the rows of one run, once for each query head of a kv head.
        """
        key = (window, repeats, first)
        if key not in self.masks:
            seen = self._seen(window, first, stop, width)
            if seen is None:
                self.masks[key] = None
            else:
                mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
                self.masks[key] = mask.repeat(1, repeats, 1).unsqueeze(0)
        return self.masks[key]

    def width(self, stop: int, block_size: int) -> int:
        """Cached tokens to score for queries before `stop`: whole blocks, so that the gathered matrix stays dense."""
        return -(-(max(self.contexts) - self.length + stop) // block_size) * block_size

    def _seen(self, window: int | None, first: int, stop: int, width: int) -> Tensor | None:
        if self.length == 1 and min(self.contexts) == width and (window is None or width <= window):
            return None
        before = torch.tensor(self.contexts).unsqueeze(1) - self.length  # [batch, 1] tokens ahead of each run
        query = (before + torch.arange(first, stop)).unsqueeze(2)  # position of each query
        key = torch.arange(width)
        seen = key <= query  # [batch, stop - first, width]
        if window is not None:
            seen &= key > query - window
        return seen


def write_kv(cache: Tensor, slots: Tensor, values: Tensor) -> None:
    """Put keys or values into the cache. slots: [T] block * block_size + offset; values: [T, heads, dim]."""
    cache.flatten(1, 2).index_copy_(1, slots, values.transpose(0, 1))


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: list[RunGroup], scale: float, window: int | None
) -> Tensor:
    """Softmax attention of each run over its own cached tokens. q: [T, heads, dim] -> [T, heads * dim].

    The run's own keys and values are in the cache already. window: how many tokens back a query sees, itself included.
    """
    kv_heads, _blocks, block_size, dim = k_cache.shape
    repeats = q.shape[1] // kv_heads
    out = torch.empty_like(q)
    for group in groups:
        batch, length = group.batch, group.length
        shape = (kv_heads, batch, group.blocks.shape[1] * block_size, dim)
        k = k_cache.flatten(2).index_select(1, group.blocks.flatten()).view(shape)
        v = v_cache.flatten(2).index_select(1, group.blocks.flatten()).view(shape)
        queries = q[group.start : group.end].view(batch, length, kv_heads, repeats, dim)
        mixed = out[group.start : group.end].view(batch, length, kv_heads, repeats, dim)
        for first in range(0, length, QUERY_ROWS):
            stop = min(first + QUERY_ROWS, length)
            width = group.width(stop, block_size)
            # query heads of one kv head become rows of one matrix: [kv_heads, batch, repeats * rows, dim]
            rows = queries[:, first:stop].permute(2, 0, 3, 1, 4).reshape(kv_heads, batch, -1, dim)
            scores = torch.matmul(rows * scale, k[:, :, :width].transpose(-1, -2))
            mask = group.mask(window, repeats, q.dtype, first, stop, width)
            if mask is not None:
                scores += mask
            part = torch.matmul(torch.softmax(scores, dim=-1), v[:, :, :width])  # softmax sums in float32
            part = part.view(kv_heads, batch, repeats, stop - first, dim)
            mixed[:, first:stop].copy_(part.permute(1, 3, 0, 2, 4))
    return out.flatten(1)
