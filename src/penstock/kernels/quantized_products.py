"""Products of 8-bit activations with 8-bit and 4-bit weights (kernels/cpu/matmul_int8.cpp, matmul_int4.cpp).

Activations [T, in] get one scale a row as they come. Packing is that of `products`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.devices.cpu import zeros_on_demand
from penstock.kernels.products import GATES, INT, PANEL, POINTER, addresses, bind, dense_rows

GROUP = 32  # inputs that share a scale in 4 bits
_OFFSET = 128  # added to 8-bit activations, which the processor wants unsigned
_GROUP_BYTES = PANEL * 2 + PANEL * GROUP // 2  # of a panel: scales, weights

_quantize_rows = bind("penstock_quantize_rows_bf16", [POINTER, INT, *[POINTER] * 2, *[INT] * 2])
_pack_int8 = bind("penstock_pack_int8", [POINTER] * 4 + [INT] * 4)
_matmul_int8 = bind("penstock_matmul_int8", [*[POINTER] * 6, *[INT] * 3, *[POINTER] * 2])
_gated_int8 = bind("penstock_gated_int8", [*[POINTER] * 8, *[INT] * 3, *[POINTER] * 2, INT])
_pack_int4 = bind("penstock_pack_int4", [POINTER] * 3 + [INT] * 4)
_matmul_int4 = bind("penstock_matmul_int4", [*[POINTER] * 5, *[INT] * 3, *[POINTER] * 2])
_gated_int4 = bind("penstock_gated_int4", [*[POINTER] * 6, *[INT] * 3, *[POINTER] * 2, INT])


@dataclass(frozen=True)
class Int8Columns:
    """What turns the sums of an 8-bit product into numbers. scales: [out] float32; offsets: [out] int32, 128 times the
    sum of each row of the matrix [out, in] (a column of the product)."""

    scales: Tensor
    offsets: Tensor


def quantize_columns(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of a matrix [out, in] to int8 in [-127, 127], to nearest, and its scale [out] float32."""
    wide = weight.float()
    top = wide.abs().amax(dim=1)
    inverse = torch.where(top > 0, torch.full_like(top, 127) / top, 0)  # 127 / top multiplies by a rounded reciprocal
    values = (wide * inverse.unsqueeze(1)).round_().to(torch.int8)
    return values, top / 127


def can_multiply_int8(weight: Tensor) -> bool:
    """Whether the 8-bit product takes a matrix [out, in] of this shape here."""
    return _matmul_int8 is not None and weight.device.type == "cpu" and weight.shape[1] % 4 == 0


def pack_int8(*weights: Tensor) -> tuple[Tensor, tuple[Int8Columns, ...]]:
    """Quantize matrices [out, in] of one shape, bfloat16, row by row, and pack them: as `pack`.

    Returns [panels, in / 4, 64, 4] int8 and what belongs to the columns of each matrix.
    """
    n, k = weights[0].shape
    width = PANEL // len(weights)
    out = zeros_on_demand((-(-n // width), k // 4, PANEL, 4), torch.int8, huge=True)
    columns = tuple(Int8Columns(torch.empty(n), torch.empty(n, dtype=torch.int32)) for _ in weights)
    assert _pack_int8 is not None  # noqa: S101 (can_multiply_int8)
    for i, (weight, column) in enumerate(zip(weights, columns, strict=True)):
        rows = weight.contiguous()
        _pack_int8(*addresses(rows, out, column.scales, column.offsets), n, k, i * width, width)
    return out, columns


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [T, in] bfloat16 to uint8 [T, in], round(x / scale) + 128, and their scales [T] float32."""
    x = dense_rows(x)
    out, scales = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(len(x), dtype=torch.float32)
    assert _quantize_rows is not None  # noqa: S101 (can_multiply_int8)
    _quantize_rows(x.data_ptr(), x.stride(0), out.data_ptr(), scales.data_ptr(), len(x), x.shape[1])
    return out, scales


def multiply_int8(
    x: Tensor, packed: Tensor, columns: Int8Columns, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x @ weight.T + bias + residual, x quantized on the way. x: [T, in] bfloat16; packed, columns: of `pack_int8`;
    bias: [n] bfloat16; residual: [T, n] bfloat16 -> [T, n]."""
    rows, row_scales = quantize_rows(x)
    residual = residual if residual is None else residual.contiguous()
    n = len(columns.scales)
    out = x.new_empty(len(x), n)
    assert _matmul_int8 is not None  # noqa: S101 (can_multiply_int8)
    _matmul_int8(
        *addresses(rows, row_scales, packed, columns.scales, columns.offsets, out),
        *(len(x), n, x.shape[1]),
        *addresses(bias, residual),
    )
    return out


def multiply_gated_int8(
    x: Tensor,
    packed: Tensor,
    gate: Int8Columns,
    up: Int8Columns,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """As `multiply_gated`, with 8-bit weights. packed: of `pack_int8(gate, up)`."""
    rows, row_scales = quantize_rows(x)
    n = len(gate.scales)
    out = x.new_empty(len(x), n)
    assert _gated_int8 is not None  # noqa: S101 (can_multiply_int8)
    _gated_int8(
        *addresses(rows, row_scales, packed, gate.scales, gate.offsets, up.scales, up.offsets, out),
        *(len(x), n, x.shape[1]),
        *addresses(gate_bias, up_bias),
        GATES[activation],
    )
    return out


def can_multiply_int4(weight: Tensor) -> bool:
    """Whether the 4-bit product takes a matrix [out, in] of this shape here."""
    return _matmul_int4 is not None and weight.device.type == "cpu" and weight.shape[1] % GROUP == 0


def pack_int4(*weights: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Quantize matrices [out, in] of one shape, bfloat16, by groups of 32 inputs, and pack them.

    Returns [panels, in / 32, bytes] uint8 and, for each matrix, the sums [out] float32 that the product takes off. Of a
    few scales for each group the one that leaves the least squared error is taken.
    """
    n, k = weights[0].shape
    width = PANEL // len(weights)
    out = zeros_on_demand((-(-n // width), k // GROUP, _GROUP_BYTES), torch.uint8, huge=True)
    offsets = tuple(torch.empty(n) for _ in weights)
    assert _pack_int4 is not None  # noqa: S101 (can_multiply_int4)
    for i, (weight, offset) in enumerate(zip(weights, offsets, strict=True)):
        rows = weight.contiguous()
        _pack_int4(*addresses(rows, out, offset), n, k, i * width, width)
    return out, offsets


def multiply_int4(x: Tensor, packed: Tensor, offsets: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """As `multiply_int8`, of `pack_int4`."""
    rows, row_scales = quantize_rows(x)
    residual = residual if residual is None else residual.contiguous()
    n = len(offsets)
    out = x.new_empty(len(x), n)
    assert _matmul_int4 is not None  # noqa: S101 (can_multiply_int4)
    _matmul_int4(*addresses(rows, row_scales, packed, offsets, out), len(x), n, x.shape[1], *addresses(bias, residual))
    return out


def multiply_gated_int4(
    x: Tensor,
    packed: Tensor,
    gate_offsets: Tensor,
    up_offsets: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    activation: str,
) -> Tensor:
    """As `multiply_gated_int8`, of `pack_int4(gate, up)`."""
    rows, row_scales = quantize_rows(x)
    n = len(gate_offsets)
    out = x.new_empty(len(x), n)
    assert _gated_int4 is not None  # noqa: S101 (can_multiply_int4)
    _gated_int4(
        *addresses(rows, row_scales, packed, gate_offsets, up_offsets, out),
        *(len(x), n, x.shape[1]),
        *addresses(gate_bias, up_bias),
        GATES[activation],
    )
    return out
