"""Weights as 8-bit floats with a scale for each output: half the bytes of bfloat16. For a GPU.

Few rows meet the widened weights as they are; many are rounded to 8-bit floats themselves, one scale a row, where the
card multiplies those (Micikevicius et al. 2022).
"""

from __future__ import annotations

from torch import Tensor

from penstock.formats import dense
from penstock.formats.dense import Gated, GatedPair, GatedPanels, Linear, Panels
from penstock.kernels import products
from penstock.kernels.stored import Matrix


def load(weight: Matrix, bias: Tensor | None = None) -> Linear:
    """Quantize and pack a matrix [out, in]. The caller may drop the original afterwards.

    One that the kernels do not take, as any on a processor, stays as it is.
    """
    if products.can_multiply("fp8", weight):
        return Panels(products.pack("fp8", (weight,), (bias,)))
    return dense.load(weight, bias)


def load_gated(
    gate: Matrix, up: Matrix, activation: str, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Gated:
    """Quantize and pack the two matrices [out, in] of a gated MLP. activation: one of ACTIVATIONS."""
    if products.can_multiply("fp8", gate) and activation in products.GATES:
        return GatedPanels(products.pack("fp8", (gate, up), (gate_bias, up_bias), activation), activation)
    return GatedPair(load(gate, gate_bias), load(up, up_bias), activation)
