"""Paged attention: one tile of a run's queries against the keys it sees, a block of the cache after the other.

The query heads of one kv head are rows of one tile, so that each key is read once for all of them. Softmax is computed
as the keys come (Dao et al. 2022). Where a step has few tiles, as with runs of a token, the keys of each are split
among programs and a second kernel joins the parts ("flash decoding"). The shape of a launch depends on the bounds that
`PagedBatch` names, never on what its tensors hold, so a captured graph can be replayed with other contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.attention import PagedBatch
from penstock.kernels.triton.device import power_of_2, processors, rocm

SHORT = 8  # runs up to this length split their keys
_SPLITS = 64  # parts at most, where they follow from the card
_FIXED = 512  # keys of a part where results must not depend on the batch
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _find_run(tile, q_starts, runs, BLOCK_Q: tl.constexpr):
    """Which run a tile belongs to, and its first query there: run i begins with tile start_i // BLOCK_Q + i."""
    run = -1
    zero = tl.load(q_starts)
    for base in range(0, runs, 128):
        index = base + tl.arange(0, 128)
        starts = tl.load(q_starts + index, mask=index < runs, other=0)
        begins = tl.where(index < runs, (starts - zero) // BLOCK_Q + index, 2**30)
        run += tl.sum((begins <= tile).to(tl.int32))
    return run, (tile - (tl.load(q_starts + run) - zero) // BLOCK_Q - run) * BLOCK_Q


@triton.jit(
    do_not_specialize=["runs", "table_stride", "max_length", "splits", "split_tiles", "alibi_width"],
    do_not_specialize_on_alignment=["q_starts", "contexts", "block_table"],
)
def _attend(
    out,  # [T, heads, DIM]
    parts,  # [runs * max_length, heads, splits, DIM] float32, where keys are split
    weights,  # [runs * max_length, heads, splits] float32: log2 of the sum that each part was divided by
    q,  # [T, heads, DIM]
    k_cache,  # [blocks, kv_heads, BLOCK_SIZE, DIM]
    v_cache,
    k_scale,  # [kv_heads] float32, or None
    v_scale,
    alibi,  # [heads, alibi_width] float32, or None
    q_starts,  # [runs + 1]
    contexts,  # [runs]
    block_table,  # [runs, table_stride]
    scale,
    softcap,  # or None, as the next two
    window,
    chunk,
    runs,
    table_stride,
    max_length,
    splits,
    split_tiles,  # tiles of keys in a part; 0: as many as share them out evenly
    alibi_width,
    q_stride,
    q_head_stride,
    kv_stride,
    kv_head_stride,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,  # no run is longer than a tile
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    kv_head, part = tl.program_id(1), tl.program_id(2)
    if ONE_TILE:
        run, first = tl.program_id(0), 0
    else:
        run, first = _find_run(tl.program_id(0), q_starts, runs, BLOCK_Q)
    start = tl.load(q_starts + run)
    length = tl.load(q_starts + run + 1) - start
    if first >= length:
        return
    context = tl.load(contexts + run)
    heads = tl.num_programs(1) * GROUP

    row = tl.arange(0, BLOCK_M)
    query, head = first + row // GROUP, kv_head * GROUP + row % GROUP
    filled = (row < BLOCK_Q * GROUP) & (query < length)
    d = tl.arange(0, DIM_PAD)
    inside = filled[:, None] & (d < DIM)[None, :]
    token = (start + query).to(tl.int64)
    queries = tl.load(q + (token * q_stride + head * q_head_stride)[:, None] + d[None, :], mask=inside, other=0.0)

    before = context - length  # tokens ahead of the run
    position = before + query
    low, high = 0, before + tl.minimum(first + BLOCK_Q, length)
    if window is not None:
        low = tl.maximum(low, before + first - window + 1)
    if chunk is not None:
        low = tl.maximum(low, (before + first) // chunk * chunk)
    low = low // TILE * TILE
    if SPLIT:
        share = split_tiles
        if split_tiles == 0:
            share = tl.cdiv(tl.maximum(high - low, 0), TILE * splits)
        low += part * share * TILE
        high = tl.minimum(high, low + share * TILE)

    factor = scale
    if k_scale is not None:
        factor *= tl.load(k_scale + kv_head)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, DIM_PAD], tl.float32)
    table = block_table + run.to(tl.int64) * table_stride
    for tile in tl.range(low, high, TILE):
        key = tile + tl.arange(0, TILE)
        known = key < high
        block = tl.load(table + key // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        place = block * kv_stride + kv_head * kv_head_stride + (key % BLOCK_SIZE) * DIM
        lies = known[:, None] & (d < DIM)[None, :]
        keys = tl.load(k_cache + place[:, None] + d[None, :], mask=lies, other=0.0)
        values = tl.load(v_cache + place[:, None] + d[None, :], mask=lies, other=0.0)
        scores = tl.dot(queries, tl.trans(keys).to(queries.dtype), input_precision=PRECISION) * factor
        if softcap is not None:  # tanh by the exponential function, which every card has
            scores = softcap * (1 - 2 / (tl.exp(scores * (2 / softcap)) + 1))
        if alibi is not None:
            drawn = filled[:, None] & (key < alibi_width)[None, :]
            scores += tl.load(alibi + head[:, None] * alibi_width + key[None, :], mask=drawn, other=0.0)
        seen = (key[None, :] <= position[:, None]) & known[None, :]
        if window is not None:
            seen &= key[None, :] > position[:, None] - window
        if chunk is not None:
            seen &= key[None, :] >= (position // chunk * chunk)[:, None]
        scores = tl.where(seen, scores * _LOG2E, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row may see no key of this tile
        p = tl.exp2(scores - base[:, None])
        shrunk = tl.exp2(top - base)
        total = total * shrunk + tl.sum(p, 1)
        mixed = mixed * shrunk[:, None]
        mixed = tl.dot(p.to(queries.dtype), values.to(queries.dtype), mixed, input_precision=PRECISION)
        top = higher

    mixed /= tl.where(total == 0, 1.0, total)[:, None]
    if v_scale is not None:
        mixed *= tl.load(v_scale + kv_head)
    if SPLIT:
        slot = ((run * max_length + query).to(tl.int64) * heads + head) * splits + part
        tl.store(weights + slot, top + tl.log2(total), mask=filled)
        tl.store(parts + slot[:, None] * DIM + d[None, :], mixed, mask=inside & (total > 0)[:, None])
    else:
        target = out + (token * heads + head)[:, None] * DIM + d[None, :]
        tl.store(target, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["max_length", "splits"], do_not_specialize_on_alignment=["q_starts"])
def _join(
    out,  # [T, heads, DIM]
    parts,  # [runs * max_length, heads, splits, DIM]
    weights,  # [runs * max_length, heads, splits]
    q_starts,  # [runs + 1]
    max_length,
    splits,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BATCH: tl.constexpr,  # parts that are read at a time
):
    """The parts of a query and head, each as heavy as the sum of its exponentials."""
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    run, query = row // max_length, row % max_length
    start = tl.load(q_starts + run)
    if query >= tl.load(q_starts + run + 1) - start:
        return
    slot = (row.to(tl.int64) * heads + head) * splits
    d = tl.arange(0, DIM_PAD)
    index = tl.arange(0, BATCH)
    top = tl.full([BATCH], float("-inf"), tl.float32)
    for base in range(0, splits, BATCH):
        top = tl.maximum(top, tl.load(weights + slot + base + index, mask=base + index < splits, other=float("-inf")))
    best = tl.max(top, 0)
    best = tl.where(best == float("-inf"), 0.0, best)
    total = tl.zeros([BATCH], tl.float32)
    mixed = tl.zeros([BATCH, DIM_PAD], tl.float32)
    for base in range(0, splits, BATCH):
        weight = tl.load(weights + slot + base + index, mask=base + index < splits, other=float("-inf"))
        weight = tl.exp2(weight - best)
        read = (weight > 0)[:, None] & (d < DIM)[None, :]
        mixed += weight[:, None] * tl.load(parts + (slot + base + index)[:, None] * DIM + d[None, :], read, other=0.0)
        total += weight
    whole = tl.sum(total, 0)
    result = tl.sum(mixed, 0) / tl.where(whole == 0, 1.0, whole)
    target = out + ((start + query).to(tl.int64) * heads + head) * DIM + d
    tl.store(target, result.to(out.dtype.element_ty), mask=d < DIM)


class _Shape(NamedTuple):
    """Sizes of a launch. block_q: queries of a tile; block_m: its rows, a query's heads side by side; tile: keys."""

    block_q: int
    block_m: int
    tile: int
    warps: int
    stages: int


def _shape(group: int, dim: int, size: int, max_length: int) -> _Shape:
    """group: query heads of a kv head; dim: padded; size: bytes of an element of q."""
    wide = dim * size  # bytes of a key
    if max_length <= SHORT and group * max_length <= 64:
        rows = max(16, power_of_2(group * max_length))
        return _Shape(rows // group, rows, 32 if wide > 256 else 64, 4, 2 if rocm() else 3)
    if size == 4:  # float32 is multiplied as such, without matrix units
        rows = max(32, power_of_2(group))
        return _Shape(rows // group, rows, 32, 4, 1)
    rows = max(128 if dim <= 128 else 64, power_of_2(group))
    return _Shape(rows // group, rows, 64 if dim <= 128 else 32, 8 if rows >= 128 else 4, 1 if rocm() else 3)


def _splits(batch: PagedBatch, tiles: int, kv_heads: int, shape: _Shape, device: torch.device) -> tuple[int, int]:
    """How many parts the keys of a tile are split into, and how many tiles of keys a part has (0: even shares)."""
    if shape.block_q < batch.max_length or batch.max_length > SHORT:
        return 1, 0
    if batch.fixed_splits:
        return -(-batch.max_context // _FIXED), _FIXED // shape.tile
    wanted = power_of_2(-(-2 * processors(device) // (tiles * kv_heads)))
    return min(wanted, _SPLITS, power_of_2(-(-batch.max_context // shape.tile))), 0


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batches: Sequence[PagedBatch],
    scale: float,
    window: int | None,
    *,
    softcap: float | None = None,
    chunk: int | None = None,
    alibi: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See `penstock.kernels.attention.paged_attention`. The last dimension of q is dense; the caches are contiguous."""
    tokens, heads, dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    out = q.new_empty(tokens, heads, dim)
    dim_pad = max(16, power_of_2(dim))
    precision = "ieee" if q.dtype == torch.float32 else "tf32"  # of 16-bit types the second says nothing
    for batch in batches:
        runs = len(batch.contexts)
        shape = _shape(heads // kv_heads, dim_pad, q.element_size(), batch.max_length)
        one_tile = batch.max_length <= shape.block_q
        tiles = runs if one_tile else batch.rows // shape.block_q + runs
        splits, split_tiles = _splits(batch, tiles, kv_heads, shape, q.device)
        parts = weights = None
        if splits > 1:
            parts = q.new_empty((runs * batch.max_length, heads, splits, dim), dtype=torch.float32)
            weights = q.new_empty((runs * batch.max_length, heads, splits), dtype=torch.float32)
        told = (batch.q_starts, batch.contexts, batch.block_table)
        sizes = (runs, batch.block_table.stride(0), batch.max_length, splits, split_tiles)
        strides = (q.stride(0), q.stride(1), k_cache.stride(0), k_cache.stride(1))
        _attend[(tiles, kv_heads, splits)](
            *(out, parts, weights, q, k_cache, v_cache, k_scale, v_scale, alibi, *told),
            *(scale, softcap, window, chunk, *sizes, 0 if alibi is None else alibi.shape[1], *strides),
            GROUP=heads // kv_heads,
            DIM=dim,
            DIM_PAD=dim_pad,
            BLOCK_SIZE=block_size,
            BLOCK_Q=shape.block_q,
            BLOCK_M=shape.block_m,
            TILE=shape.tile,
            ONE_TILE=one_tile,
            SPLIT=splits > 1,
            PRECISION=precision,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
        if splits > 1:
            _join[(runs * batch.max_length, heads)](
                out, parts, weights, batch.q_starts, batch.max_length, splits, DIM=dim, DIM_PAD=dim_pad, BATCH=16
            )
    return out.flatten(1)
