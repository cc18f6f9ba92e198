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
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed.weight, packed.bias, "none", [], "")
        return result
    return F.linear(x, packed.weight, packed.bias)
