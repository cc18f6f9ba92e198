"""8-bit weights with 8-bit activations: half the bytes of bfloat16, twice its arithmetic.

Weights have one scale for each output, found at load; activations one for each row, found as they come (Dettmers et al.
2022 call it vector-wise quantization).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.formats.dense import Gated, GatedPair, GatedPanels, Linear, Panels
from penstock.kernels import products
from penstock.kernels.stored import Matrix


def load(weight: Matrix, bias: Tensor | None = None) -> Linear:
    """Quantize and pack a matrix [out, in]. The caller may drop the original afterwards."""
    if products.can_multiply("int8", weight):
        return Panels(products.pack("int8", (weight,), (bias,)))
    return Int8Plain(*products.quantize_columns(weight), bias)


def load_gated(
    gate: Matrix, up: Matrix, activation: str, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Gated:
    """Quantize and pack the two matrices [out, in] of a gated MLP. activation: one of ACTIVATIONS."""
    if products.can_multiply("int8", gate) and activation in products.GATES:
        return GatedPanels(products.pack("int8", (gate, up), (gate_bias, up_bias), activation), activation)
    return GatedPair(load(gate, gate_bias), load(up, up_bias), activation)


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
