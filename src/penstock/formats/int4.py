"""4-bit weights, a scale for every 32 inputs, with 8-bit activations: a third of the bytes of bfloat16.

The format of a single stream, which waits for memory alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.formats import int8
from penstock.formats.dense import Gated, GatedPair, Linear
from penstock.kernels import quantized_products as products
from penstock.kernels.products import GATES


def load(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Quantize and pack a matrix [out, in]. The caller may drop the original afterwards.

    One that the 4-bit product does not take is kept in 8 bits.
    """
    if weight.dtype == torch.bfloat16 and products.can_multiply_int4(weight):
        packed, (offsets,) = products.pack_int4(weight)
        return Int4Panels(packed, offsets, bias)
    return int8.load(weight, bias)


def load_gated(
    gate: Tensor, up: Tensor, activation: str, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Gated:
    """Quantize and pack the two matrices [out, in] of a gated MLP. activation: one of ACTIVATIONS."""
    if gate.dtype == torch.bfloat16 and products.can_multiply_int4(gate) and activation in GATES:
        packed, (gate_offsets, up_offsets) = products.pack_int4(gate, up)
        return GatedInt4Panels(packed, gate_offsets, up_offsets, gate_bias, up_bias, activation)
    return GatedPair(load(gate, gate_bias), load(up, up_bias), activation)


@dataclass(frozen=True)
class Int4Panels:
    """weight and offsets: as kernels/quantized_products packs them; bias: [out] or None."""

    weight: Tensor
    offsets: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return products.multiply_int4(x, self.weight, self.offsets, self.bias, residual)


@dataclass(frozen=True)
class GatedInt4Panels:
    """weight: gate and up side by side, as kernels/quantized_products packs them."""

    weight: Tensor
    gate_offsets: Tensor
    up_offsets: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        return products.multiply_gated_int4(
            x, self.weight, self.gate_offsets, self.up_offsets, self.gate_bias, self.up_bias, self.activation
        )
