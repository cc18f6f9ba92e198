"""Products of few rows (5 to some hundred) with a matrix, on the matrix units, weights widened as they arrive.

A program makes a strip of columns from whole sums, so nothing is added up between programs and the result of a row
depends on nothing but the row. Strips are narrow: a small matrix still keeps all of the card's memory busy.
"""

from __future__ import annotations

import triton
import triton.language as tl

from penstock.kernels.triton.activation import activate
from penstock.kernels.triton.matvec import scaled, scaled_nibbles


@triton.jit
def _dots(
    x, weights, scales, row, column, rows, n, x_stride, K: tl.constexpr, FORM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x @ weights.T of a tile. row: [BLOCK_M]; column: [BLOCK_N] -> [BLOCK_M, BLOCK_N] float32"""
    WIDTH: tl.constexpr = K // 2 if FORM == "int4" else K
    kept, asked = (column < n)[:, None], (row < rows)[:, None]
    place = column.to(tl.int64) * WIDTH
    at = x + row.to(tl.int64)[:, None] * x_stride
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, WIDTH, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        there = (k < WIDTH)[None, :]
        stored = tl.load(weights + place[:, None] + k[None, :], mask=kept & there, other=0.0)
        left = tl.load(at + k[None, :], mask=asked & there, other=0.0)
        if FORM == "int4":
            right = tl.load(at + WIDTH + k[None, :], mask=asked & there, other=0.0)
            low, high = scaled_nibbles(stored, scales, column, n, start, WIDTH, BLOCK_N, BLOCK_K, GROUP)
            total = tl.dot(left, tl.trans(low.to(x.dtype.element_ty)), total, input_precision=PRECISION)
            total = tl.dot(right, tl.trans(high.to(x.dtype.element_ty)), total, input_precision=PRECISION)
        else:
            if FORM == "int8":
                stored = stored.to(tl.float32)
            total = tl.dot(left, tl.trans(stored.to(x.dtype.element_ty)), total, input_precision=PRECISION)
    return total


@triton.jit
def results(
    x, weights, scales, bias, row, column, rows, n, x_stride, K: tl.constexpr, FORM: tl.constexpr, GATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of a product, scaled, with its bias and gate; of a gate, n outputs come of 2 n columns."""
    y = _dots(
        x, weights, scales, row, column, rows, n, x_stride,
        K, FORM, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, STAGES, PRECISION,
    )  # fmt: skip
    y = scaled(y, scales, bias, column, n, FORM)
    if GATE != "none":
        other = column + n
        up = _dots(
            x, weights, scales, row, other, rows, 2 * n, x_stride,
            K, FORM, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, STAGES, PRECISION,
        )  # fmt: skip
        y = activate(y, GATE) * scaled(up, scales, bias, other, 2 * n, FORM)
    return y


@triton.jit(do_not_specialize=["rows"])
def matmul(
    out,  # [rows, n]
    x,  # [rows, K]
    weights,  # as of matvec
    scales,
    bias,
    residual,
    rows,
    n,
    x_stride,
    residual_stride,
    K: tl.constexpr,
    FORM: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = results(
        x, weights, scales, bias, row, column, rows, n, x_stride,
        K, FORM, GATE, BLOCK_M, BLOCK_N, BLOCK_K, GROUP, STAGES, PRECISION,
    )  # fmt: skip
    mask = (row < rows)[:, None] & (column < n)[None, :]
    to = row.to(tl.int64)[:, None]
    if residual is not None:
        y += tl.load(residual + to * residual_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + to * n + column[None, :], y.to(out.dtype.element_ty), mask=mask)
