"""8-bit weights with 8-bit activations: half the bytes of bfloat16, twice its arithmetic.

Weights have one scale for each output, found at load; activations one for each row, found as they come (Dettmers et al.
2022 call it vector-wise quantization).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.formats.dense import Gated, GatedPair, Linear
from penstock.kernels import quantized_products as products
from penstock.kernels.products import GATES
from penstock.kernels.quantized_products import Int8Columns


def load(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Quantize and pack a matrix [out, in]. The caller may drop the original afterwards."""
    if weight.dtype == torch.bfloat16 and products.can_multiply_int8(weight):
        packed, (columns,) = products.pack_int8(weight)
        return Int8Panels(packed, columns, bias)
    return Int8Plain(*products.quantize_columns(weight), bias)


def load_gated(
    gate: Tensor, up: Tensor, activation: str, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Gated:
    """Quantize and pack the two matrices [out, in] of a gated MLP. activation: one of ACTIVATIONS."""
    if gate.dtype == torch.bfloat16 and products.can_multiply_int8(gate) and activation in GATES:
        packed, (first, second) = products.pack_int8(gate, up)
        return GatedInt8Panels(packed, first, second, gate_bias, up_bias, activation)
    return GatedPair(load(gate, gate_bias), load(up, up_bias), activation)


@dataclass(frozen=True)
class Int8Panels:
    """weight: as kernels/quantized_products packs it; bias: [out] or None."""

    weight: Tensor
    columns: Int8Columns
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return products.multiply_int8(x, self.weight, self.columns, self.bias, residual)


@dataclass(frozen=True)
class GatedInt8Panels:
    """weight: gate and up side by side, as kernels/quantized_products packs them."""

    weight: Tensor
    gate: Int8Columns
    up: Int8Columns
    gate_bias: Tensor | None
    up_bias: Tensor | None
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return products.multiply_gated_int8(
            x, self.weight, self.gate, self.up, self.gate_bias, self.up_bias, self.activation
        )


@dataclass(frozen=True)
class Int8Plain:
    """The twin for processors without the instruction: the same numbers, multiplied in the type of x; slow."""

    values: Tensor  # [out, in] int8
    scales: Tensor  # [out] float32
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        scales = x.float().abs().amax(dim=1, keepdim=True) / 127
        rows = torch.round(x.float() / scales.clamp_min(1e-30))
        y = (rows @ self.values.float().T) * scales * self.scales
        if self.bias is not None:
            y += self.bias.float()
        return (y if residual is None else y + residual.float()).to(x.dtype)
