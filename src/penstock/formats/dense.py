"""Weights as plain float32, bfloat16 or float16 matrices.

In bfloat16 on a processor with native products the matrix is repacked once, at load, into the layout of the kernel that
multiplies it: the same numbers come out, at the limit of memory or arithmetic instead of half of it. With AVX512_BF16
that is our own (kernels/cpu/matmul_bf16.cpp), elsewhere oneDNN's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.devices.cpu import fast_bfloat16
from penstock.kernels import products
from penstock.kernels.norms import ACTIVATIONS
from penstock.kernels.products import Packed
from penstock.kernels.stored import Matrix, whole

if TYPE_CHECKING:
    from penstock.kernels.triton.product import DeviceMatrix

_FUSED = {"silu": "swish", "swish": "swish"}  # by oneDNN's names
_ROWS_HINT = 32  # oneDNN chooses its layout for about this many rows a step; good from 1 to 512


class Linear(Protocol):
    """A projection that is ready to multiply."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias, plus `residual` where it is given. x: [T, in]; residual: [T, out] -> [T, out]."""
        ...


class Gated(Protocol):
    """The first half of a gated MLP. activation: by its name in ACTIVATIONS."""

    @property
    def activation(self) -> str: ...

    def __call__(self, x: Tensor) -> Tensor:
        """activation(x @ gate.T + gate_bias) * (x @ up.T + up_bias). x: [T, in] -> [T, out]."""
        ...

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the activation and the product are given, for those who add to it: [T, out] each."""
        ...


def load(weight: Matrix, bias: Tensor | None = None) -> Linear:
    """Pack a matrix [out, in]. The caller may drop the original afterwards."""
    for form in ("bf16", "f32"):
        if products.can_multiply(form, weight):
            return Panels(products.pack(form, (weight,), (bias,)))
    weight = whole(weight)
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and fast_bfloat16():
        return OneDnn(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT), bias)
    return Plain(weight.contiguous(), bias)


def load_gated(
    gate: Matrix, up: Matrix, activation: str, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Gated:
    """Pack the two matrices [out, in] of a gated MLP. activation: one of ACTIVATIONS."""
    for form in ("bf16", "f32"):
        if products.can_multiply(form, gate) and activation in products.GATES:
            return GatedPanels(products.pack(form, (gate, up), (gate_bias, up_bias), activation), activation)
    first, second = load(gate, gate_bias), load(up, up_bias)
    if isinstance(first, OneDnn) and isinstance(second, OneDnn) and activation in _FUSED:
        return GatedOneDnn(first, second, activation)
    return GatedPair(first, second, activation)


@dataclass(frozen=True)
class Plain:
    """weight: [out, in]; bias: [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if residual is None else y.add_(residual)


@dataclass(frozen=True)
class Panels:
    """A matrix that our own kernels multiply, in any of their forms."""

    packed: Packed | DeviceMatrix

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return products.multiply(self.packed, x, residual)


@dataclass(frozen=True)
class OneDnn:
    """weight: opaque to torch; bias: [out] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return self.then(x, "none")
        return self.with_other(x, residual, "add")

    def then(self, x: Tensor, activation: str) -> Tensor:
        """The product, and an activation (oneDNN's name) while the tile is in a register."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "")
        return y

    def with_other(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        """The product, added to ("add") or multiplied by ("mul") another [T, out]."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, operation)
        return y


@dataclass(frozen=True)
class GatedPanels:
    """The two matrices of a gated MLP, side by side in panels."""

    packed: Packed | DeviceMatrix
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return products.multiply_gated(self.packed, x)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return products.apart(products.multiply(self._plain, x), self.packed.n)

    @cached_property
    def _plain(self) -> Packed | DeviceMatrix:
        return products.side_by_side(self.packed)


@dataclass(frozen=True)
class GatedOneDnn:
    """activation: one that oneDNN has."""

    gate: OneDnn
    up: OneDnn
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return self.up.with_other(x, self.gate.then(x, _FUSED[self.activation]), "mul")

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x), self.up(x)


@dataclass(frozen=True)
class GatedPair:
    """Two projections and what happens between them."""

    gate: Linear
    up: Linear
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.gate(x)).mul_(self.up(x))

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.gate(x), self.up(x)
