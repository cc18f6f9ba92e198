"""Norms of rows, and rounding to 8 bits behind them. The residual stream is added to by the products before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.triton.device import power_of_2


@triton.jit(do_not_specialize=["inner"])
def _norm(
    out,  # [rows, n]
    scales,  # [rows] float32, or None
    x,  # row r at (r // inner) * x_stride + (r % inner) * x_inner_stride
    weight,  # [n], or None
    bias,
    eps,
    inner,
    x_stride,
    x_inner_stride,
    N: tl.constexpr,
    KIND: tl.constexpr,  # rms, layer, none
    LIMIT: tl.constexpr,  # the largest number that the results are scaled to, with scales
    ROUND: tl.constexpr,  # to whole numbers
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < N
    y = tl.load(x + row // inner * x_stride + row % inner * x_inner_stride + column, mask=mask, other=0.0)
    y = y.to(tl.float32)
    if KIND == "layer":
        y = tl.where(mask, y - tl.sum(y, 0) / N, 0.0)
    if KIND != "none":
        y *= tl.rsqrt(tl.sum(y * y, 0) / N + eps)
    if weight is not None:
        y *= tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        y += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    if scales is not None:
        top = tl.max(tl.abs(y), 0)
        tl.store(scales + row, top / LIMIT)
        y *= LIMIT / tl.maximum(top, 1e-30)
        if ROUND:  # to nearest, ties to even: the bits that a number near 1.5 * 2^23 keeps
            y = (y + 12582912.0) - 12582912.0
    tl.store(out + row * N + column, y.to(out.dtype.element_ty), mask=mask)


def norm(
    x: Tensor,
    kind: str,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    narrow: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Norm of the last axis of x [n], [rows, n] or [rows, inner, n], whose last dimension is dense.

    kind: rms, layer, or none. narrow: float8 or int8 of the results, each row scaled by its largest. Returns the
    results, and the scales [rows] or None.
    """
    n = x.shape[-1]
    flat = x if x.dim() <= 3 and x.stride(-1) == 1 else x.contiguous().view(-1, n)
    inner = flat.shape[1] if flat.dim() == 3 else 1
    rows = flat.numel() // n
    out = torch.empty(x.shape, dtype=narrow or x.dtype, device=x.device)
    scales = None if narrow is None else torch.empty(rows, dtype=torch.float32, device=x.device)
    limit = 0.0 if narrow is None else 127.0 if narrow == torch.int8 else torch.finfo(narrow).max
    block = power_of_2(n)
    _norm[(rows,)](
        out,
        scales,
        flat,
        weight,
        bias,
        eps,
        inner,
        flat.stride(0) if flat.dim() > 1 else n,
        flat.stride(1) if flat.dim() == 3 else 0,
        N=n,
        KIND=kind,
        LIMIT=limit,
        ROUND=narrow == torch.int8,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out, scales
