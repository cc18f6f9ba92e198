"""Products of activations with packed matrices (kernels/cpu/matmul_*.cpp): float32, bfloat16, 8 and 4 bits. Matrices
on a GPU are packed and multiplied by kernels/triton/product.py.

A matrix is packed once into panels of 64 output columns; the two of a gated MLP share panels, 32 columns of each. With
quantized weights the activations [T, in] are quantized to 8 bits on the way, with one scale a row.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penstock.devices.cpu import flags, zeros_on_demand
from penstock.kernels.native import LIBRARY
from penstock.kernels.stored import Matrix, check, opened, whole

if TYPE_CHECKING:
    from penstock.kernels.triton.product import DeviceMatrix

GATES = {"silu": 0, "swish": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "relu": 2}  # activations that are built in
GROUP = 32  # inputs that share a scale in 4 bits

_PANEL = 64
_STRIP = 32  # rows that a thread packs at a time
_GROUP_BYTES = _PANEL * 2 + _PANEL * GROUP // 2  # of a panel: scales, weights
_INT, _POINTER = ctypes.c_int64, ctypes.c_void_p


class _Norm(ctypes.Structure):
    """penstock_norm of kernels/cpu/norms.h."""

    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("eps", ctypes.c_float), ("kind", ctypes.c_int32))


class _Matrix(ctypes.Structure):
    """penstock_matrix of kernels/cpu/product.h."""

    _fields_ = (
        ("weights", _POINTER),
        ("scales", _POINTER * 2),
        ("offsets", _POINTER * 2),
        ("biases", _POINTER * 2),
        ("n", _INT),
        ("k", _INT),
        ("activation", _INT),
        ("norm", _Norm),
    )


def _bind(name: str, arguments: list[Any], result: Any = None) -> Any:
    """One function of the library, or None where it was not compiled for this processor."""
    function = getattr(LIBRARY, name, None)
    if function is not None:
        function.argtypes, function.restype = arguments, result
    return function


_MATRIX = ctypes.POINTER(_Matrix)
_FORMS = ("f32", "bf16", "int8", "int4")
_multiply = {f: _bind(f"penstock_matmul_{f}", [_MATRIX, _POINTER, _INT, _INT, *[_POINTER] * 3]) for f in _FORMS}
_gated = {f: _bind(f"penstock_gated_{f}", [_MATRIX, _POINTER, _INT, _INT, *[_POINTER] * 2]) for f in _FORMS}
_pack = {
    form: _bind(f"penstock_pack_{form}", [*[_POINTER] * (3 + beside), *[_INT] * 4], ctypes.c_int)
    for form, beside in (("f32", 0), ("bf16", 0), ("int8", 2), ("int4", 1))
}
_quantize_rows = _bind(
    "penstock_quantize_rows_bf16", [ctypes.POINTER(_Norm), _POINTER, _INT, *[_POINTER] * 2, *[_INT] * 2]
)


COMPILED = _multiply["int8"] is not None  # whether any of this can be used


@dataclass(frozen=True)
class RowNorm:
    """A norm that rows go through on their way into a product. kind: rms or layer; weight, bias: [in] bfloat16."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    eps: float

    def scaled(self, factors: Tensor) -> RowNorm:
        """The norm and then a factor for each channel. factors: [in]"""
        return replace(self, weight=self.weight * factors, bias=None if self.bias is None else self.bias * factors)

    @property
    def described(self) -> _Norm:
        """The same for C."""
        kind = 1 if self.kind == "rms" else 2 if self.bias is None else 3
        return _Norm(self.weight.data_ptr(), _address(self.bias), self.eps, kind)


@dataclass(frozen=True)
class Packed:
    """A matrix [out, in], or the two of a gated MLP, as the kernels of one form take it.

    weights: panels; scales, offsets: [out] of each matrix, where the form has them. activation: of GATES, by number.
    norm: what rows go through first.
    """

    form: str
    weights: Tensor
    scales: tuple[Tensor, ...]
    offsets: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    n: int
    k: int
    activation: int = 0
    norm: RowNorm | None = None
    matrix: _Matrix = field(init=False, repr=False)  # the same, for C

    def __post_init__(self) -> None:
        places = [(_POINTER * 2)(*map(_address, tensors)) for tensors in (self.scales, self.offsets, self.biases)]
        norm = _Norm() if self.norm is None else self.norm.described
        matrix = _Matrix(self.weights.data_ptr(), *places, self.n, self.k, self.activation, norm)
        object.__setattr__(self, "matrix", matrix)


def can_multiply(form: str, weight: Matrix) -> bool:
    """Whether a matrix [out, in] can be packed in a form (f32, bf16, int8, int4; on a GPU fp8) where it lies.

    For bf16 a processor with AMX has better units, which oneDNN drives.
    """
    if isinstance(weight, Tensor) and weight.is_cuda:
        from penstock.kernels.triton import product

        return product.can_multiply(form, weight)
    if form not in _FORMS:
        return False
    together = {"f32": 1, "bf16": 2, "int8": 4, "int4": GROUP}[form]
    return (
        _multiply[form] is not None
        and not (form == "bf16" and "amx_bf16" in flags())
        and weight.dtype == (torch.float32 if form == "f32" else torch.bfloat16)
        and weight.device.type == "cpu"
        and weight.shape[1] % together == 0
    )


def pack(
    form: str, weights: tuple[Matrix, ...], biases: tuple[Tensor | None, ...], activation: str = "silu"
) -> Packed | DeviceMatrix:
    """Pack a matrix [out, in], or the two of a gated MLP, that `can_multiply` allows. activation: one of GATES.

    8 bits: one scale for each row of the matrix. 4 bits: one for each group of 32 inputs of a row, of a few the one
    that leaves the least squared error. What lies in files is read on the way; raises ModelError where it cannot be.
    """
    if weights[0].is_cuda:
        from penstock.kernels.triton import product

        return product.pack(form, tuple(map(whole, weights)), biases, activation if len(weights) > 1 else None)
    n, k = weights[0].shape
    width = _PANEL // len(weights)
    panels = -(-n // width)
    scales: tuple[Tensor, ...] = ()
    offsets: tuple[Tensor, ...] = ()
    if form == "f32":
        out = zeros_on_demand((panels, k, _PANEL), torch.float32, huge=True)
    elif form == "bf16":
        out = zeros_on_demand((panels, k // 2, _PANEL, 2), torch.bfloat16, huge=True)
    elif form == "int8":
        out = zeros_on_demand((panels, k // 4, _PANEL, 4), torch.int8, huge=True)
        scales = tuple(torch.empty(n) for _ in weights)
        offsets = tuple(torch.empty(n, dtype=torch.int32) for _ in weights)
    else:
        out = zeros_on_demand((panels, k // GROUP, _GROUP_BYTES), torch.uint8, huge=True)
        offsets = tuple(torch.empty(n) for _ in weights)
    scratch = torch.empty(torch.get_num_threads() * _STRIP * k * (weights[0].dtype.itemsize + 1), dtype=torch.uint8)
    for i, weight in enumerate(weights):
        beside = [t[i].data_ptr() for t in (scales, offsets) if t]
        with opened(weight) as rows:
            check(weight, _pack[form](rows, scratch.data_ptr(), out.data_ptr(), *beside, n, k, i * width, width))
    biases = tuple(None if bias is None else bias.contiguous() for bias in biases)
    return Packed(form, out, scales, offsets, biases, n, k, GATES[activation])


def behind(norm: RowNorm, packed: Packed) -> Packed:
    """The same matrix behind a norm: a call less, and a pass over each row where the product quantizes it."""
    return replace(packed, norm=norm)


def multiply(packed: Packed | DeviceMatrix, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """norm(x) @ weight.T + bias + residual. x: [T, in] bfloat16 (f32: float32); residual: [T, n] -> [T, n]."""
    if not isinstance(packed, Packed):
        from penstock.kernels.triton import product

        return product.multiply(packed, x, residual)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = x.shape[0]
    out = x.new_empty(rows, packed.n)
    added = None if residual is None else residual.contiguous().data_ptr()
    scratch = _scratch(packed, x)
    _multiply[packed.form](
        *(
            packed.matrix,
            x.data_ptr(),
            x.stride(0),
            rows,
            added,
            out.data_ptr(),
            None if scratch is None else scratch.data_ptr(),
        )
    )
    return out


def multiply_gated(packed: Packed | DeviceMatrix, x: Tensor) -> Tensor:
    """activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias), x or its norm. x, as there: [T, in] -> [T, n]."""
    if not isinstance(packed, Packed):
        return multiply(packed, x)
    x = x if x.stride(1) == 1 else x.contiguous()
    rows = x.shape[0]
    out = x.new_empty(rows, packed.n)
    scratch = _scratch(packed, x)
    _gated[packed.form](
        packed.matrix, x.data_ptr(), x.stride(0), rows, out.data_ptr(), None if scratch is None else scratch.data_ptr()
    )
    return out


def side_by_side(packed: Packed | DeviceMatrix) -> Packed | DeviceMatrix:
    """The two matrices of a gated MLP as one that `multiply` takes, over the same panels: its outputs are those of the
    gate and of the other by turns, as many of each as `apart` undoes."""
    if not isinstance(packed, Packed):
        return replace(packed, n=2 * packed.n, gate="none")
    half = _PANEL // 2
    panels = -(-packed.n // half)

    def woven(pair: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
        """[panels * 64], zeros where a matrix has none or the last panel is not full."""
        like = next((tensor for tensor in pair if tensor is not None), None)
        if like is None:
            return ()
        both = like.new_zeros(2, panels * half)
        for row, tensor in zip(both, pair, strict=True):
            if tensor is not None:
                row[: packed.n] = tensor
        return (both.view(2, panels, half).transpose(0, 1).reshape(-1),)

    return Packed(
        packed.form,
        packed.weights,
        woven(packed.scales),
        woven(packed.offsets),
        woven(packed.biases),
        panels * _PANEL,
        packed.k,
        norm=packed.norm,
    )


def apart(y: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """What a `side_by_side` product gave, [T, panels * 64], as the outputs of the two matrices, [T, n] each."""
    if y.is_cuda:
        return y[:, :n].contiguous(), y[:, n:].contiguous()
    turns = y.view(len(y), -1, 2, _PANEL // 2)
    gate, up = (turns[:, :, i].reshape(len(y), -1)[:, :n].contiguous() for i in range(2))
    return gate, up


def quantize_rows(x: Tensor, norm: RowNorm | None = None) -> tuple[Tensor, Tensor]:
    """Activations [T, in] bfloat16, or their norms, as round(x / scale) + 128, uint8, and the scales [T] float32."""
    out, scales = x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(len(x), dtype=torch.float32)
    _quantize_rows(
        _Norm() if norm is None else norm.described,
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        scales.data_ptr(),
        *x.shape,
    )
    return out, scales


def quantize_columns(weight: Matrix) -> tuple[Tensor, Tensor]:
    """Each row of a matrix [out, in] to int8 in [-127, 127], to nearest, and its scale [out] float32."""
    wide = whole(weight).float()
    top = wide.abs().amax(dim=1)
    inverse = torch.where(top > 0, torch.full_like(top, 127) / top, 0)  # 127 / top multiplies by a rounded reciprocal
    return (wide * inverse.unsqueeze(1)).round_().to(torch.int8), top / 127


def _scratch(packed: Packed, x: Tensor) -> Tensor | None:
    """Where quantized rows, a byte a number, and their scales go, or normed ones."""
    if packed.form in ("f32", "bf16"):
        return None if packed.norm is None else x.new_empty(x.shape[0] * packed.k)
    return x.new_empty(x.shape[0] * (packed.k + 4) // 2)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
