"""Products of one or two rows with a matrix: each weight is read once, and met by every row.

At one row a card waits for memory alone. What counts is how many bytes are on their way: many small programs, 16 bytes
a load, the weights of the next steps copied into shared memory while these are multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.triton.activation import activate


@triton.jit
def scaled_nibbles(
    packed, scales, column, n, start, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Bytes -> the two weights of each, in float32. packed: [BLOCK_N, BLOCK_K] from `start` of rows of WIDTH.

    [-8, 7] is stored as [0, 15]; those bits become the last of a number near 2^23, which is cheaper than a conversion.
    """
    bits = packed.to(tl.int32)
    low = ((bits & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    high = ((bits >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    group = start // GROUP + tl.arange(0, BLOCK_K // GROUP)
    place = scales + column.to(tl.int64)[:, None] * (2 * WIDTH // GROUP) + group[None, :]
    mask = (column < n)[:, None] & (group < WIDTH // GROUP)[None, :]
    by_low = tl.load(place, mask=mask, other=0.0).to(tl.float32)[:, :, None]
    by_high = tl.load(place + WIDTH // GROUP, mask=mask, other=0.0).to(tl.float32)[:, :, None]
    low = tl.reshape(low, BLOCK_N, BLOCK_K // GROUP, GROUP) * by_low
    high = tl.reshape(high, BLOCK_N, BLOCK_K // GROUP, GROUP) * by_high
    return tl.reshape(low, BLOCK_N, BLOCK_K), tl.reshape(high, BLOCK_N, BLOCK_K)


@triton.jit
def _sums(
    x, weights, scales, column, n, x_stride, K: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x @ weights.T of some columns. column: [BLOCK_N] -> [ROWS, BLOCK_N] float32"""
    WIDTH: tl.constexpr = K // 2 if FORM == "int4" else K  # stored numbers of a column
    kept = (column < n)[:, None]
    place = column.to(tl.int64)[:, None] * WIDTH
    first = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    second = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)[None, :]
        there = k < WIDTH
        stored = tl.load(weights + (place + k), mask=kept & there, other=0.0)
        if FORM == "int4":
            low, high = scaled_nibbles(stored, scales, column, n, start, WIDTH, BLOCK_N, BLOCK_K, GROUP)
            first += low * tl.load(x + k, mask=there, other=0.0).to(tl.float32)
            first += high * tl.load(x + WIDTH + k, mask=there, other=0.0).to(tl.float32)
        else:
            wide = stored.to(tl.float32)
            first += wide * tl.load(x + k, mask=there, other=0.0).to(tl.float32)
            if ROWS == 2:
                second += wide * tl.load(x + x_stride + k, mask=there, other=0.0).to(tl.float32)
    if ROWS == 2:
        return tl.trans(tl.join(tl.sum(first, 1), tl.sum(second, 1)))
    else:
        return tl.sum(first, 1)[None, :]


@triton.jit
def matvec(
    out,  # [ROWS, n]
    x,  # [ROWS, K]
    weights,  # [n or 2 n, K], the second matrix of a gated MLP behind the first
    scales,  # [n or 2 n] float32; int4: [n or 2 n, K / GROUP]
    bias,  # [n or 2 n], or None
    residual,  # [ROWS, n], or None
    n,
    x_stride,
    residual_stride,
    K: tl.constexpr,
    FORM: tl.constexpr,  # plain, fp8, int8, int4
    GATE: tl.constexpr,  # the activation of a gated MLP, or none
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = _sums(x, weights, scales, column, n, x_stride, K, FORM, ROWS, BLOCK_N, BLOCK_K, GROUP, STAGES)
    y = scaled(y, scales, bias, column, n, FORM)
    if GATE != "none":
        other = column + n
        up = _sums(x, weights, scales, other, 2 * n, x_stride, K, FORM, ROWS, BLOCK_N, BLOCK_K, GROUP, STAGES)
        y = activate(y, GATE) * scaled(up, scales, bias, other, 2 * n, FORM)
    row = tl.arange(0, ROWS)
    mask = (row < ROWS)[:, None] & (column < n)[None, :]
    if residual is not None:
        y += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row[:, None] * n + column[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def scaled(y, scales, bias, column, n, FORM: tl.constexpr):
    """Sums of products -> results of a projection. y: [rows, columns] float32; column: [columns], below n."""
    if FORM == "fp8" or FORM == "int8":
        y *= tl.load(scales + column, mask=column < n, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + column, mask=column < n, other=0.0).to(tl.float32)[None, :]
    return y
