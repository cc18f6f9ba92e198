"""Matrix products with packed bfloat16 weights (kernels/cpu/matmul_bf16.cpp), and what every packed product shares.

Weights are packed into panels of 64 output columns; two matrices of one shape may share panels, 32 columns of each, for
the two halves of a gated MLP.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from penstock.devices.cpu import flags, zeros_on_demand
from penstock.kernels.native import LIBRARY

PANEL = 64
GATES = {"silu": 0, "swish": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "relu": 2}  # activations that are built in

INT, POINTER = ctypes.c_int64, ctypes.c_void_p


def bind(
    name: str, arguments: list[type[ctypes._SimpleCData[int]] | type[ctypes.c_void_p]]
) -> ctypes._NamedFuncPointer | None:
    """One function of the library, or None where it was not compiled for this processor."""
    function = getattr(LIBRARY, name, None)
    if function is not None:
        function.argtypes, function.restype = arguments, None
    return function


_pack_bf16 = bind("penstock_pack_bf16", [POINTER] * 2 + [INT] * 4)
_matmul_bf16 = bind("penstock_matmul_bf16", [POINTER, INT, *[POINTER] * 2, *[INT] * 3, *[POINTER] * 2])
_gated_bf16 = bind("penstock_gated_bf16", [POINTER, INT, *[POINTER] * 2, *[INT] * 3, *[POINTER] * 2, INT])


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
    return pack_panels(_pack_bf16, weights, 2)


def multiply(x: Tensor, packed: Tensor, n: int, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """x @ weight.T + bias + residual. x: [T, in] bfloat16; packed: of `pack(weight)`; bias: [n]; residual: [T, n]."""
    x, residual = dense_rows(x), residual if residual is None else residual.contiguous()
    out = x.new_empty(len(x), n)
    assert _matmul_bf16 is not None  # noqa: S101 (can_multiply)
    _matmul_bf16(
        *(x.data_ptr(), x.stride(0), packed.data_ptr(), out.data_ptr(), len(x), n, x.shape[1]),
        *addresses(bias, residual),
    )
    return out


def multiply_gated(
    x: Tensor, packed: Tensor, n: int, gate_bias: Tensor | None, up_bias: Tensor | None, activation: str
) -> Tensor:
    """activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias). x: [T, in] bfloat16; packed: of `pack(gate, up)`;
    activation: one of GATES. Returns [T, n]."""
    x = dense_rows(x)
    out = x.new_empty(len(x), n)
    assert _gated_bf16 is not None  # noqa: S101 (can_multiply)
    _gated_bf16(
        *(x.data_ptr(), x.stride(0), packed.data_ptr(), out.data_ptr(), len(x), n, x.shape[1]),
        *addresses(gate_bias, up_bias),
        GATES[activation],
    )
    return out


def pack_panels(function: ctypes._NamedFuncPointer | None, weights: tuple[Tensor, ...], together: int) -> Tensor:
    """Matrices [out, in] of one shape, side by side in panels. together: inputs that make four bytes."""
    n, k = weights[0].shape
    width = PANEL // len(weights)
    out = zeros_on_demand((-(-n // width), k // together, PANEL, together), weights[0].dtype, huge=True)
    assert function is not None  # noqa: S101 (can_multiply)
    for i, weight in enumerate(weights):
        rows = weight.contiguous()
        function(rows.data_ptr(), out.data_ptr(), n, k, i * width, width)
    return out


def addresses(*tensors: Tensor | None) -> list[int | None]:
    """Where the numbers of each tensor lie, as C takes them."""
    return [None if t is None else t.data_ptr() for t in tensors]


def dense_rows(x: Tensor) -> Tensor:
    """x with rows that are dense in themselves."""
    return x if x.stride(1) == 1 else x.contiguous()
