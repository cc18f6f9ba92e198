"""Keys and values as signed bytes, with one scale for each token and kv head.

A layer's cache of bytes is [blocks, kv_heads, block_size, dim + SCALE] int8, but a head's block is not rows of that
width: first come its block_size rows of dim bytes, then its block_size scales, float32. So rows lie as they do in any
other cache, and the scales come with the same stream of memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = 4  # bytes of a scale
_MOST = 127


def width(dim: int, dtype: torch.dtype) -> int:
    """The last axis of a cache of heads of `dim` numbers."""
    return dim + SCALE if dtype == torch.int8 else dim


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., dim] as bytes and scales [...]: the largest size of each is 127 of them. One with a NaN or an
    infinity gets the scale NaN, and so does everything that is made of it."""
    wide = x.float()
    top = wide.abs().amax(dim=-1, keepdim=True)
    broken = ~top.isfinite()
    inverse = torch.where((top > 1e-30) & ~broken, _MOST / top, 0.0)
    whole = torch.floor((wide * inverse).masked_fill(broken, 0.0) + (_MOST + 1.5)) - (_MOST + 1)
    return whole.to(torch.int8), (top / _MOST).masked_fill(broken, float("nan")).squeeze(-1)


def write(cache: Tensor, x: Tensor, block: Tensor, place: Tensor) -> None:
    """Put vectors x [T, kv_heads, dim] into places of blocks, [T] each."""
    rows, scales = _parts(cache)
    numbers, sizes = quantize(x)
    rows.transpose(1, 2)[block, place] = numbers
    scales.transpose(1, 2)[block, place] = sizes.unsqueeze(-1).contiguous().view(torch.int8)


def widened(cache: Tensor, dtype: torch.dtype) -> Tensor:
    """What it stands for: [..., kv_heads, block_size, dim + SCALE] -> [..., kv_heads, block_size, dim]."""
    rows, scales = _parts(cache)
    return (rows.float() * scales.contiguous().view(torch.float32)).to(dtype)


def _parts(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Views of its rows, [..., block_size, dim], and of the bytes of its scales, [..., block_size, SCALE]."""
    size, dim = cache.shape[-2], cache.shape[-1] - SCALE
    rows, scales = cache.flatten(-2).split((size * dim, size * SCALE), dim=-1)
    return rows.unflatten(-1, (size, dim)), scales.unflatten(-1, (size, SCALE))
