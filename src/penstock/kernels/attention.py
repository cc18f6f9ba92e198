"""Paged attention: runs of any length over a cache of blocks.

The compiled kernels read the blocks where they lie. Where nothing is compiled, blocks are gathered and multiplied by
torch.

The cache of one layer is two tensors [kv_heads, blocks, block_size, head_dim]: with the heads outermost, the blocks of
one sequence gather into a matrix per head by copying whole blocks, and grouped query heads multiply it without being
repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.rotary import rotate

SCORES = 2**24  # elements of one tile of scores; a longer run is scored in slices of its queries
SLICE = 256  # queries of a run in one tile at most: keys beyond the slice are never touched by it


@dataclass
class RunGroup:
    """Runs of one length that multiply as one batch.

    Their tokens are rows [start, start + batch * length) of the step. contexts: for each run the tokens that its last
    one sees, itself included. blocks: [batch, n] block ids that hold them; what fills up a shorter row is never seen.
    """

    start: int
    length: int
    contexts: list[int]
    blocks: Tensor
    # the mask of the last slice of queries, for each sliding window: the layers of a step share it
    masks: dict[int | None, tuple[int, Tensor | None]] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return len(self.contexts)

    @property
    def end(self) -> int:
        return self.start + self.batch * self.length


def rotate_into_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Turn q and k by their angles (see `rotate`) and put k and v into the cache. Returns the turned q.

    q: [T, heads, dim]; k, v: [T, kv_heads, dim]; slots: [T] block * block_size + offset.
    """
    if native.can_rotate(q, cos, k_cache):
        return native.rotate_into(q, k, v, cos, sin, slots, k_cache, v_cache)
    k_cache.flatten(1, 2).index_copy_(1, slots, rotate(k, cos, sin).transpose(0, 1))
    v_cache.flatten(1, 2).index_copy_(1, slots, v.transpose(0, 1))
    return rotate(q, cos, sin)


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: list[RunGroup], scale: float, window: int | None
) -> Tensor:
    """Softmax attention of each run over its own cached tokens. q: [T, heads, dim] -> [T, heads * dim].

    The run's own keys and values are in the cache already. window: how many tokens back a query sees, itself included.
    """
    out = torch.empty_like(q)
    compiled = native.can_attend(q, k_cache)
    for group in groups:
        rows = slice(group.start, group.end)
        if compiled:
            native.attend(q[rows], out[rows], k_cache, v_cache, group.blocks, group.contexts, scale, window)
        else:
            _attend(q[rows], out[rows], k_cache, v_cache, group, scale, window)
    return out.flatten(1)


def _attend(
    q: Tensor, out: Tensor, k_cache: Tensor, v_cache: Tensor, group: RunGroup, scale: float, window: int | None
) -> None:
    """One group by two matrix products over its gathered keys and values. q, out: [batch * length, heads, dim]."""
    kv_heads, _blocks, block_size, dim = k_cache.shape
    batch, length, longest, repeats = group.batch, group.length, max(group.contexts), q.shape[1] // kv_heads
    shape = (kv_heads, batch, group.blocks.shape[1] * block_size, dim)
    k = k_cache.flatten(2).index_select(1, group.blocks.flatten()).view(shape)
    v = v_cache.flatten(2).index_select(1, group.blocks.flatten()).view(shape)
    queries = q.view(batch, length, kv_heads, repeats, dim)
    mixed = out.view(batch, length, kv_heads, repeats, dim)
    step = max(1, min(SLICE, SCORES // (q.shape[1] * batch * shape[2])))
    for first in range(0, length, step):
        stop = min(first + step, length)
        # whole blocks, so that the gathered matrices stay dense in the last slice
        width = -(-(longest - length + stop) // block_size) * block_size
        # query heads of one kv head become rows of one matrix: [kv_heads, batch, repeats * rows, dim]
        rows = queries[:, first:stop].permute(2, 0, 3, 1, 4).reshape(kv_heads, batch, -1, dim)
        scores = torch.matmul(rows * scale, k[:, :, :width].transpose(-1, -2))
        mask = _mask(group, window, first, stop, width, q.dtype)
        if mask is not None:
            scores.view(kv_heads, batch, repeats, stop - first, width).add_(mask)
        part = torch.matmul(torch.softmax(scores, dim=-1), v[:, :, :width])  # softmax sums in float32
        part = part.view(kv_heads, batch, repeats, stop - first, dim)
        mixed[:, first:stop].copy_(part.permute(1, 3, 0, 2, 4))


def _mask(group: RunGroup, window: int | None, first: int, stop: int, width: int, dtype: torch.dtype) -> Tensor | None:
    """What to add to the scores of queries first..stop: 0 for a key that is seen, -inf for others, None if all are.

    [batch, 1, stop - first, width]
    """
    known = group.masks.get(window)
    if known is not None and known[0] == first:
        return known[1]
    mask = None
    if group.length > 1 or min(group.contexts) < width or (window is not None and width > window):
        before = torch.tensor(group.contexts).unsqueeze(1) - group.length  # [batch, 1] tokens ahead of each run
        query = (before + torch.arange(first, stop)).unsqueeze(2)  # position of each query
        key = torch.arange(width)
        hidden = key > query
        if window is not None:
            hidden |= key <= query - window
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).unsqueeze(1)
    group.masks[window] = (first, mask)
    return mask
