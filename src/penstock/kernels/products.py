"""Matrix products with packed weights: bfloat16, and 8-bit weights with 8-bit activations (kernels/cpu/matmul_*.cpp).

Weights are packed into panels of 64 output columns; two matrices of one shape may share panels, 32 columns of each, for
the two halves of a gated MLP.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.devices.cpu import flags, zeros_on_demand
from penstock.kernels.native import LIBRARY

PANEL = 64
GATES = {"silu": 0, "swish": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "relu": 2}  # activations that are built in
_OFFSET = 128  # added to 8-bit activations, which the processor wants unsigned

_int, _pointer = ctypes.c_int64, ctypes.c_void_p


def _function(
    name: str, arguments: list[type[ctypes._SimpleCData[int]] | type[ctypes.c_void_p]]
) -> ctypes._NamedFuncPointer | None:
    """One function of the library, or None where it was not compiled for this processor."""
    function = getattr(LIBRARY, name, None)
    if function is not None:
        function.argtypes, function.restype = arguments, None
    return function


_pack_bf16 = _function("penstock_pack_bf16", [_pointer] * 2 + [_int] * 4)
_matmul_bf16 = _function("penstock_matmul_bf16", [_pointer, _int, *[_pointer] * 2, *[_int] * 3, *[_pointer] * 2])
_gated_bf16 = _function("penstock_gated_bf16", [_pointer, _int, *[_pointer] * 2, *[_int] * 3, *[_pointer] * 2, _int])
_quantize_rows = _function("penstock_quantize_rows_bf16", [_pointer, _int, *[_pointer] * 2, *[_int] * 2])
_pack_int8 = _function("penstock_pack_int8", [_pointer] * 2 + [_int] * 4)
_matmul_int8 = _function("penstock_matmul_int8", [*[_pointer] * 6, *[_int] * 3, *[_pointer] * 2])
_gated_int8 = _function("penstock_gated_int8", [*[_pointer] * 8, *[_int] * 3, *[_pointer] * 2, _int])


def can_multiply(weight: Tensor) -> bool:
    """Whether `pack` takes a matrix [out, in]: bfloat16 with an even number of inputs, on a processor that multiplies
    it by AVX512_BF16. One with AMX has better units for it, which oneDNN drives."""
    return (
        _matmul_bf16 is not None
        and "amx_bf16" not in flags()
        and weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.shape[1] % 2 == 0
    )


def pack(*weights: Tensor) -> Tensor:
    """A matrix [out, in] as panels for `multiply`, or two of one shape for `multiply_gated`.

    Returns [panels, in / 2, 64, 2].
    """
    return _pack(_pack_bf16, weights, 2)


def multiply(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x @ weight.T + bias + residual. x: [T, in] bfloat16; packed: of `pack(weight)`; bias: [n]; residual: [T, n]."""
    x, residual = _dense(x), residual if residual is None else residual.contiguous()
    out = x.new_empty(len(x), n)
    assert _matmul_bf16 is not None  # noqa: S101 (can_multiply)
    _matmul_bf16(
        *(x.data_ptr(), x.stride(0), packed.data_ptr(), out.data_ptr(), len(x), n, x.shape[1]),
        *_addresses(bias, residual),
    )
    return out


def multiply_gated(
    x: Tensor, packed: Tensor, n: int, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    """activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias). x: [T, in] bfloat16; packed: of `pack(gate, up)`;
    activation: one of GATES. Returns [T, n]."""
    x = _dense(x)
    out = x.new_empty(len(x), n)
    assert _gated_bf16 is not None  # noqa: S101 (can_multiply)
    _gated_bf16(
        *(x.data_ptr(), x.stride(0), packed.data_ptr(), out.data_ptr(), len(x), n, x.shape[1]),
        *_addresses(gate_bias, up_bias),
        GATES[activation],
    )
    return out


@dataclass(frozen=True)
class Int8Columns:
    """An 8-bit matrix [out, in], each row of it (a column of the product) with its scale.

    values: int8; scales: [out] float32; offsets: [out] int32, 128 times the sum of each row.
    """

    values: Tensor
    scales: Tensor
    offsets: Tensor

    def without_values(self) -> Int8Columns:
        """What stays beside the packed values."""
        return replace(self, values=self.values.new_empty(0))


def quantize_columns(weight: Tensor) -> Int8Columns:
    """Each row of a matrix [out, in] to [-127, 127] times its own scale, to nearest."""
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / 127
    values = (wide / scales.clamp_min(1e-30).unsqueeze(1)).round_().to(torch.int8)
    return Int8Columns(values, scales, values.sum(dim=1, dtype=torch.int32) * _OFFSET)


def can_multiply_int8(weight: Tensor) -> bool:
    """Whether the 8-bit product takes a matrix [out, in] of this shape here."""
    return _matmul_int8 is not None and weight.device.type == "cpu" and weight.shape[1] % 4 == 0


def pack_int8(*weights: Tensor) -> Tensor:
    """As `pack`, of the values of Int8Columns. Returns [panels, in / 4, 64, 4]."""
    return _pack(_pack_int8, weights, 4)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [T, in] bfloat16 to uint8 [T, in], round(x / scale) + 128, and their scales [T] float32."""
    x = _dense(x)
    out, scales = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(len(x), dtype=torch.float32)
    assert _quantize_rows is not None  # noqa: S101 (can_multiply_int8)
    _quantize_rows(x.data_ptr(), x.stride(0), out.data_ptr(), scales.data_ptr(), len(x), x.shape[1])
    return out, scales


def multiply_int8(
    x: Tensor, packed: Tensor, columns: Int8Columns, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """x @ weight.T + bias + residual, x quantized on the way. x: [T, in] bfloat16; packed: of `pack_int8`; columns: its
    scales and offsets; bias: [n] bfloat16; residual: [T, n] bfloat16 -> [T, n]."""
    rows, row_scales = quantize_rows(x)
    residual = residual if residual is None else residual.contiguous()
    n = len(columns.scales)
    out = x.new_empty(len(x), n)
    assert _matmul_int8 is not None  # noqa: S101 (can_multiply_int8)
    _matmul_int8(
        *_addresses(rows, row_scales, packed, columns.scales, columns.offsets, out),
        *(len(x), n, x.shape[1]),
        *_addresses(bias, residual),
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
    """As `multiply_gated`, with 8-bit weights. packed: of `pack_int8(gate.values, up.values)`."""
    rows, row_scales = quantize_rows(x)
    n = len(gate.scales)
    out = x.new_empty(len(x), n)
    assert _gated_int8 is not None  # noqa: S101 (can_multiply_int8)
    _gated_int8(
        *_addresses(rows, row_scales, packed, gate.scales, gate.offsets, up.scales, up.offsets, out),
        *(len(x), n, x.shape[1]),
        *_addresses(gate_bias, up_bias),
        GATES[activation],
    )
    return out


def _pack(function: ctypes._NamedFuncPointer | None, weights: tuple[Tensor, ...], together: int) -> Tensor:
    """together: inputs that lie side by side, four bytes of them."""
    n, k = weights[0].shape
    width = PANEL // len(weights)
    out = zeros_on_demand((-(-n // width), k // together, PANEL, together), weights[0].dtype, huge=True)
    assert function is not None  # noqa: S101 (can_multiply)
    for i, weight in enumerate(weights):
        rows = weight.contiguous()
        function(rows.data_ptr(), out.data_ptr(), n, k, i * width, width)
    return out


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None else t.data_ptr() for t in tensors]


def _dense(x: Tensor) -> Tensor:
    """x with rows that are dense in themselves."""
    return x if x.stride(1) == 1 else x.contiguous()
