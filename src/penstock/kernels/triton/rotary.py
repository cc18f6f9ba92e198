"""Rotary positions of queries and keys, and the write of keys and values into the cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.triton.device import power_of_2

_HEADS = 4  # heads of a program


@triton.jit
def _turned(x, cos, sin, place, d, half, mask):
    """x[place + d] with each pair (i, i + half) turned."""
    partner = tl.where(d < half, d + half, d - half)
    sign = tl.where(d < half, -1.0, 1.0)
    straight = tl.load(x + place[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    across = tl.load(x + place[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    return straight * cos[None, :] + across * (sign * sin)[None, :]


@triton.jit
def _rotate_into(
    out,  # [T, heads, DIM]
    q,  # [T, heads, DIM]
    k,  # [T, kv_heads, DIM]
    v,
    cos,  # [T, DIM]
    sin,
    slots,  # [T]
    k_cache,  # [blocks, kv_heads, BLOCK_SIZE, DIM]
    v_cache,
    k_scale,  # [kv_heads] float32, or None
    v_scale,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    kv_stride,
    LIMIT: tl.constexpr,  # the largest number of the cache's type, with NARROW
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BATCH: tl.constexpr,
    NARROW: tl.constexpr,  # the cache holds 8-bit floats
):
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, DIM_PAD)
    c = tl.load(cos + token * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    s = tl.load(sin + token * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    QUERIES: tl.constexpr = (HEADS + BATCH - 1) // BATCH
    if part < QUERIES:
        query = part * BATCH + tl.arange(0, BATCH)
        asked = (query < HEADS)[:, None] & (d < DIM)[None, :]
        turned = _turned(q, c, s, token * q_stride + query * q_head_stride, d, DIM // 2, asked)
        target = out + (token * HEADS + query)[:, None] * DIM + d[None, :]
        tl.store(target, turned.to(out.dtype.element_ty), mask=asked)
    else:
        slot = tl.load(slots + token).to(tl.int64)
        head = (part - QUERIES) * BATCH + tl.arange(0, BATCH)
        mask = (head < KV_HEADS)[:, None] & (d < DIM)[None, :] & (slot >= 0)
        keys = _turned(k, c, s, token * k_stride + head * k_head_stride, d, DIM // 2, mask)
        values = tl.load(v + (token * v_stride + head * v_head_stride)[:, None] + d[None, :], mask=mask, other=0.0)
        values = values.to(tl.float32)
        if k_scale is not None:
            keys /= tl.load(k_scale + head, mask=head < KV_HEADS, other=1.0)[:, None]
        if v_scale is not None:
            values /= tl.load(v_scale + head, mask=head < KV_HEADS, other=1.0)[:, None]
        if NARROW:
            keys = tl.minimum(tl.maximum(keys, -LIMIT), LIMIT)
            values = tl.minimum(tl.maximum(values, -LIMIT), LIMIT)
        place = slot // BLOCK_SIZE * kv_stride + (head * BLOCK_SIZE + slot % BLOCK_SIZE) * DIM
        tl.store(k_cache + place[:, None] + d[None, :], keys.to(k_cache.dtype.element_ty), mask=mask)
        tl.store(v_cache + place[:, None] + d[None, :], values.to(v_cache.dtype.element_ty), mask=mask)


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
    """See `penstock.kernels.attention.rotate_into_cache`. The last dimensions are dense, the caches contiguous."""
    tokens, heads, dim = q.shape
    kv_heads, block_size = k_cache.shape[1:3]
    out = q.new_empty(tokens, heads, dim)
    _rotate_into[(tokens, -(-heads // _HEADS) + -(-kv_heads // _HEADS))](
        out,
        q,
        k,
        v,
        cos,
        sin,
        slots,
        k_cache,
        v_cache,
        k_scale,
        v_scale,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_cache.stride(0),
        LIMIT=torch.finfo(k_cache.dtype).max,
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        DIM_PAD=power_of_2(dim),
        BLOCK_SIZE=block_size,
        BATCH=_HEADS,
        NARROW=k_cache.element_size() == 1,
        num_warps=1 if dim <= 128 else 2,
    )
    return out
