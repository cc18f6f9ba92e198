"""Weights as plain float32, bfloat16 or float16 matrices.

In bfloat16 on a processor with native products the matrix is repacked once into oneDNN's blocked layout: the same
numbers come out, at the speed of the memory bus instead of half of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.devices.cpu import fast_bfloat16
from penstock.kernels.norms import ACTIVATIONS

_FUSED = {"silu": "swish", "swish": "swish"}  # by oneDNN's names
_ROWS_HINT = 32  # the layout is chosen for about this many rows a step; good from 1 to 512


@dataclass(frozen=True)
class DenseWeight:
    """One packed projection. weight: [out, in], opaque to torch when `packed`; bias: [out] or None."""

    weight: Tensor
    bias: Tensor | None
    packed: bool


def load(weight: Tensor, bias: Tensor | None = None) -> DenseWeight:
    """Pack a matrix [out, in] for `linear`. The caller may drop the original afterwards."""
    if weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and fast_bfloat16():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        return DenseWeight(packed, bias, packed=True)
    return DenseWeight(weight.contiguous(), bias, packed=False)


def linear(x: Tensor, packed: DenseWeight) -> Tensor:
    """x @ weight.T + bias. x: [T, in] -> [T, out]."""
    if packed.packed:
        return _product(x, packed, "none")
    return F.linear(x, packed.weight, packed.bias)


def linear_add(x: Tensor, packed: DenseWeight, residual: Tensor) -> Tensor:
    """residual + linear(x, packed). x: [T, in]; residual: [T, out] -> [T, out]."""
    if packed.packed:
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, residual, packed.weight, packed.bias, "add")
        return result
    return F.linear(x, packed.weight, packed.bias).add_(residual)


def gated(x: Tensor, gate: DenseWeight, up: DenseWeight, activation: str) -> Tensor:
    """activation(linear(x, gate)) * linear(x, up). x: [T, in] -> [T, out].

    Packed weights apply the activation and the product while the tile is still in a register.
    """
    if gate.packed and up.packed and activation in _FUSED:
        opened = _product(x, gate, _FUSED[activation])
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, opened, up.weight, up.bias, "mul")
        return result
    return ACTIVATIONS[activation](linear(x, gate)).mul_(linear(x, up))


def _product(x: Tensor, packed: DenseWeight, activation: str) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, activation, [], "")
    return result
