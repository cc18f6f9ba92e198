"""Paged attention: runs of any length over a cache of blocks.

The compiled kernels read the blocks where they lie. Where nothing is compiled, blocks are gathered and multiplied by
torch.

The cache of one layer is two tensors [blocks, kv_heads, block_size, head_dim]: a sequence is a few long stretches of
memory, and a new one touches few pages. A cache of signed bytes has scales beside its blocks (`byte_cache`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels import byte_cache, native
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
    # the mask of the last slice of queries, for each window and chunk: the layers of a step share it
    masks: dict[tuple[int | None, int | None], tuple[int, Tensor | None]] = field(default_factory=dict)
    _there: PagedBatch | None = None

    @cached_property
    def ends(self) -> Tensor:
        """contexts as a tensor [batch]."""
        return torch.tensor(self.contexts)

    def on(self, device: torch.device, block_size: int) -> PagedBatch:
        """The same runs as a GPU takes them; the layers of a step share it."""
        if self._there is None:
            starts = self.start + torch.arange(self.batch + 1) * self.length
            self._there = PagedBatch(
                q_starts=starts.to(device, torch.int32),
                contexts=self.ends.to(device, torch.int32),
                block_table=self.blocks.to(device, torch.int32),
                rows=self.batch * self.length,
                max_length=self.length,
                max_context=self.blocks.shape[1] * block_size,
                fixed_splits=True,
            )
        return self._there

    @property
    def batch(self) -> int:
        return len(self.contexts)

    @property
    def end(self) -> int:
        return self.start + self.batch * self.length


@dataclass(frozen=True)
class PagedBatch:
    """Runs as a GPU sees them: what varies from step to step is in its memory, and only bounds are known outside.

    q_starts: [runs + 1] int32, run i has the rows q_starts[i] to q_starts[i + 1] of the step. contexts: [runs] int32,
    the tokens that its last one sees, itself included; 0 makes zeros of its rows, for runs that only fill up a batch.
    block_table: [runs, width] int32, the blocks that hold them; what lies past the context is never read.

    rows: of all these runs; max_length: of the longest; max_context: of all contexts; each may be more than it is.
    fixed_splits: sums are split by the context alone, so that a run's result does not depend on the others.
    """

    q_starts: Tensor
    contexts: Tensor
    block_table: Tensor
    rows: int
    max_length: int
    max_context: int
    fixed_splits: bool = False

    def groups(self, block_size: int) -> list[RunGroup]:
        """The same runs as a processor takes them, each by itself, and with no more blocks than it has tokens in."""
        starts, contexts = self.q_starts.tolist(), self.contexts.tolist()
        return [
            RunGroup(start, stop - start, [context], blocks[: -(-context // block_size)].unsqueeze(0).long())
            for start, stop, context, blocks in zip(starts, starts[1:], contexts, self.block_table, strict=False)
            if stop > start and context > 0
        ]


def rotate_into_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Turn q and k by their angles (see `rotate`) and put k and v into the cache. Returns the turned q.

    q: [T, heads, dim]; k, v: [T, kv_heads, dim]; slots: [T] block * block_size + offset; those of type int32 may
    be negative, to write nothing. The cache may hold signed bytes, or 8-bit floats, which saturate; k_scale, v_scale:
    [kv_heads] float32, what a 1 of these stands for.
    """
    if q.is_cuda:
        from penstock.kernels.triton import rotary

        return rotary.rotate_into_cache(q, k, v, cos, sin, slots, k_cache, v_cache, k_scale, v_scale)
    if native.can_rotate(q, cos, k_cache) and slots.dtype == torch.int64:
        return native.rotate_into(q, k, v, cos, sin, slots, k_cache, v_cache)
    kept = slots >= 0
    _put(k_cache, rotate(k, cos, sin)[kept], slots[kept], k_scale)
    _put(v_cache, v[kept], slots[kept], v_scale)
    return rotate(q, cos, sin)


def _put(cache: Tensor, x: Tensor, slots: Tensor, scales: Tensor | None = None) -> None:
    """Put x, [T, kv_heads, dim], into the cache."""
    block, place = (slots // cache.shape[2]).long(), (slots % cache.shape[2]).long()
    if cache.dtype == torch.int8:
        byte_cache.write(cache, x, block, place)
    else:
        _bits(cache).transpose(1, 2)[block, place] = _bits(_narrowed(x, cache.dtype, scales))


def _bits(x: Tensor) -> Tensor:
    """x, or where it holds 8-bit floats, which little is defined for, their bytes."""
    return x.view(torch.uint8) if x.element_size() == 1 else x


def _narrowed(x: Tensor, dtype: torch.dtype, scales: Tensor | None) -> Tensor:
    """x [T, kv_heads, dim] as a cache of `dtype` holds it."""
    if scales is not None:
        x = x / scales.unsqueeze(1)
    if dtype.itemsize == 1:
        x = x.float().clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return x.to(dtype)


def store(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Put keys and values, [T, kv_heads, dim], into the cache. slots: [T] block * block_size + offset."""
    ones = k.new_ones(len(k), 1, k.shape[2])
    if native.can_rotate(k, ones, k_cache):
        native.rotate_into(k, k, v, ones, torch.zeros_like(ones), slots, k_cache, v_cache)  # by no angle
        return
    _put(k_cache, k, slots)
    _put(v_cache, v, slots)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    groups: Sequence[RunGroup] | Sequence[PagedBatch],
    scale: float,
    window: int | None,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
    alibi: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each run over its own cached tokens. q: [T, heads, dim] -> [T, heads * dim].

    groups: runs as a processor has them, or a GPU.

    The run's own keys and values are in the cache already. window: how many tokens back a query sees, itself included.
    softcap: scores become softcap * tanh(score / softcap). chunk: a query sees only keys of its own stretch of so many
    tokens. alibi: [heads, positions] float32, added to the scores by the place of the key (Press et al. 2021; the
    query's place adds the same to all, which softmax forgets). k_scale, v_scale: of an 8-bit cache, see
    `rotate_into_cache`.
    """
    if q.is_cuda:
        from penstock.kernels.triton import attention

        batches = [g if isinstance(g, PagedBatch) else g.on(q.device, k_cache.shape[2]) for g in groups]
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        return attention.paged_attention(
            q, k_cache, v_cache, batches, scale, window, softcap=softcap, chunk=chunk, alibi=alibi, **scales
        )
    if k_cache.dtype.itemsize == 1 and k_cache.is_floating_point():
        k_cache, v_cache = _widened(k_cache, q.dtype, k_scale), _widened(v_cache, q.dtype, v_scale)
    out = torch.zeros_like(q) if any(isinstance(group, PagedBatch) for group in groups) else torch.empty_like(q)
    compiled = native.can_attend(q, k_cache)
    for group in chain.from_iterable(g.groups(k_cache.shape[2]) if isinstance(g, PagedBatch) else (g,) for g in groups):
        whole = group.start == 0 and group.end == len(q)
        rows, result = (q, out) if whole else (q[group.start : group.end], out[group.start : group.end])
        if compiled:
            native.attend(
                rows, result, k_cache, v_cache, group.blocks, group.ends, scale, window, softcap, chunk, alibi
            )
        else:
            attend_gathered(rows, result, k_cache, v_cache, group, Rule(scale, window, softcap, chunk, alibi))
    return out.flatten(1)


def _widened(cache: Tensor, dtype: torch.dtype, scales: Tensor | None) -> Tensor:
    """What a cache of 8-bit floats stands for."""
    wide = cache.float() if scales is None else cache.float() * scales.view(-1, 1, 1)
    return wide.to(dtype)


@dataclass(frozen=True)
class Rule:
    """How scores are made and which keys are seen; see `paged_attention`.

    relative: [heads, distances], added by how far the key is behind the query, beyond the last as there.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None
    alibi: Tensor | None = None
    relative: Tensor | None = None


def attend_gathered(q: Tensor, out: Tensor, k_cache: Tensor, v_cache: Tensor, group: RunGroup, rule: Rule) -> None:
    """One group by two matrix products over its gathered keys and values. q, out: [batch * length, heads, dim]."""
    kv_heads, block_size, dim = *k_cache.shape[1:3], q.shape[2]
    batch, length, longest, repeats = group.batch, group.length, max(group.contexts), q.shape[1] // kv_heads
    shape = (kv_heads, batch, group.blocks.shape[1] * block_size, dim)
    blocks = group.blocks.to(q.device)
    k, v = (_gathered(cache, blocks, q.dtype).permute(2, 0, 1, 3, 4).reshape(shape) for cache in (k_cache, v_cache))
    queries = q.view(batch, length, kv_heads, repeats, dim)
    mixed = out.view(batch, length, kv_heads, repeats, dim)
    step = max(1, min(SLICE, SCORES // (q.shape[1] * batch * shape[2])))
    for first in range(0, length, step):
        stop = min(first + step, length)
        # whole blocks, so that the gathered matrices stay dense in the last slice
        width = -(-(longest - length + stop) // block_size) * block_size
        # query heads of one kv head become rows of one matrix: [kv_heads, batch, repeats * rows, dim]
        rows = queries[:, first:stop].permute(2, 0, 3, 1, 4).reshape(kv_heads, batch, -1, dim)
        scores = torch.matmul(rows * rule.scale, k[:, :, :width].transpose(-1, -2))
        by_query = scores.view(kv_heads, batch, repeats, stop - first, width)
        if rule.softcap is not None:
            scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
        if rule.alibi is not None:
            by_query.add_(_by_key(rule.alibi, width).view(kv_heads, 1, repeats, 1, width))
        if rule.relative is not None:
            far = _distances(group, first, stop, width).clamp_(0, rule.relative.shape[1] - 1)
            by_query.add_(rule.relative[:, far.to(q.device)].unflatten(0, (kv_heads, repeats)).transpose(1, 2))
        mask = _mask(group, rule, first, stop, width, q)
        if mask is not None:
            by_query.add_(mask)
        part = torch.matmul(torch.softmax(scores, dim=-1), v[:, :, :width])  # softmax sums in float32
        part = part.view(kv_heads, batch, repeats, stop - first, dim)
        mixed[:, first:stop].copy_(part.permute(1, 3, 0, 2, 4))


def _gathered(cache: Tensor, blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """[batch, n, kv_heads, block_size, dim]"""
    found = cache[blocks]
    return byte_cache.widened(found, dtype) if cache.dtype == torch.int8 else found


def _by_key(alibi: Tensor, width: int) -> Tensor:
    """The first `width` columns; what fills up the last block lies beyond every context. [heads, width]"""
    return alibi[:, :width] if width <= alibi.shape[1] else F.pad(alibi, (0, width - alibi.shape[1]))


def _distances(group: RunGroup, first: int, stop: int, width: int) -> Tensor:
    """How far the keys up to `width` are behind the queries first..stop. [batch, stop - first, width]"""
    before = torch.tensor(group.contexts).unsqueeze(1) - group.length  # [batch, 1] tokens ahead of each run
    return (before + torch.arange(first, stop)).unsqueeze(2) - torch.arange(width)


def _mask(group: RunGroup, rule: Rule, first: int, stop: int, width: int, like: Tensor) -> Tensor | None:
    """What to add to the scores of queries first..stop: 0 for a key that is seen, -inf for others, None if all are.

    [batch, 1, stop - first, width], of the type of `like` and beside it.
    """
    window, chunk = rule.window, rule.chunk
    known = group.masks.get((window, chunk))
    if known is not None and known[0] == first:
        return known[1]
    mask = None
    limit = min((n for n in (window, chunk) if n is not None), default=width)
    if group.length > 1 or min(group.contexts) < width or width > limit:
        behind, key = _distances(group, first, stop, width), torch.arange(width)
        hidden = behind < 0
        if window is not None:
            hidden |= behind >= window
        if chunk is not None:
            hidden |= key < (behind + key) // chunk * chunk
        mask = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, float("-inf")).unsqueeze(1)
        mask = mask.to(like.device)
    group.masks[window, chunk] = (first, mask)
    return mask


def alibi_table(heads: int, positions: int, scale: float = 1.0, half: bool = False) -> Tensor:
    """What ALiBi adds for a key at each place: a slope of its head times the place. [heads, positions] float32.

    Slopes are powers of two, those that a power of two of heads would have first, then every other one of twice as many
    (Press et al. 2021). half: slopes and products are rounded to bfloat16 before `scale`, as Falcon was trained with.
    """
    whole = 2 ** math.floor(math.log2(heads))

    def slopes(count: int) -> Tensor:
        return torch.tensor(2.0 ** -(8.0 / count)).pow(torch.arange(1, count + 1, dtype=torch.int32))

    chosen = torch.cat((slopes(whole), slopes(2 * whole)[::2][: heads - whole]))
    places = torch.arange(positions)
    if half:
        return (chosen.bfloat16().unsqueeze(1) * places).float() * scale
    return chosen.unsqueeze(1) * places * scale
