"""Activations: inside other kernels, and as the product of the two halves of a gated MLP."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

KINDS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "quick_gelu": "quick_gelu",
}  # the names of config.json -> what the kernels call it

_BLOCK = 1024


@triton.jit
def activate(x, KIND: tl.constexpr):
    """x: float32 of any shape. Sigmoids by the exponential function, which every card has."""
    if KIND == "silu":
        x = x / (1 + tl.exp(-x))
    elif KIND == "quick_gelu":
        x = x / (1 + tl.exp(-1.702 * x))
    elif KIND == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh(y)) / 2 is the sigmoid of 2 y
        x = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif KIND == "relu":
        x = tl.maximum(x, 0.0)
    elif KIND == "relu2":
        x = tl.maximum(x, 0.0)
        x = x * x
    else:
        tl.static_assert(KIND == "none")
    return x


@triton.jit
def _gate_product(out, x, n, x_stride, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + row * x_stride + column, mask=column < n, other=0.0).to(tl.float32)
    up = tl.load(x + row * x_stride + n + column, mask=column < n, other=0.0).to(tl.float32)
    tl.store(out + row * n + column, (activate(gate, KIND) * up).to(out.dtype.element_ty), mask=column < n)


def gate_product(x: Tensor, kind: str) -> Tensor:
    """activation(first half) * second half of each row. x: [T, 2 n] -> [T, n]. kind: the kernels' name."""
    rows, n = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, n, dtype=x.dtype, device=x.device)
    _gate_product[(rows, -(-n // _BLOCK))](out, x, n, x.stride(0), KIND=kind, BLOCK=_BLOCK)
    return out
