"""4-bit weights, a scale for every 32 inputs, with 8-bit activations: a third of the bytes of bfloat16.

The format of a single stream, which waits for memory alone.
"""

from __future__ import annotations

from torch import Tensor

from penstock.formats import int8
from penstock.formats.dense import Gated, GatedPair, GatedPanels, Linear, Panels
from penstock.kernels import products
from penstock.kernels.stored import Matrix


def load(weight: Matrix, bias: Tensor | None = None) -> Linear:
    """Quantize and pack a matrix [out, in]. The caller may drop the original afterwards.

    One that the 4-bit product does not take is kept in 8 bits.
    """
    if products.can_multiply("int4", weight):
        return Panels(products.pack("int4", (weight,), (bias,)))
    return int8.load(weight, bias)


def load_gated(
    gate: Matrix, up: Matrix, activation: str, gate_bias: Tensor | None = None, up_bias: Tensor | None = None
) -> Gated:
    """Quantize and pack the two matrices [out, in] of a gated MLP. activation: one of ACTIVATIONS."""
    if products.can_multiply("int4", gate) and activation in products.GATES:
        return GatedPanels(products.pack("int4", (gate, up), (gate_bias, up_bias), activation), activation)
    return GatedPair(load(gate, gate_bias), load(up, up_bias), activation)
