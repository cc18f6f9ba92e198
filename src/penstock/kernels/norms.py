"""Normalisation and activations as plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels import native


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in float32 inside. x: [..., n], weight: [n]. (Zhang & Sennrich 2019)"""
    if x.is_cuda:
        from penstock.kernels.triton import norms

        return norms.norm(x, "rms", weight, eps=eps)[0]
    if native.can_norm(x, weight):
        return native.rms_norm(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / std(x) * weight + bias over the last axis, in float32 inside. (Ba et al. 2016)"""
    if x.is_cuda:
        from penstock.kernels.triton import norms

        return norms.norm(x, "layer", weight, bias, eps)[0]
    if weight is not None and native.can_norm(x, weight):
        return native.layer_norm(x, weight, bias, eps)
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Each row [T, n] to 8 bits (a float8 type or int8), its largest to the largest there is. -> [T, n], scales [T]."""
    if x.is_cuda:
        from penstock.kernels.triton import norms

        values, scales = norms.norm(x, "none", narrow=dtype)
        return values, cast(Tensor, scales)
    limit = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    wide = x.float()
    top = wide.abs().amax(dim=1)
    wide = wide * (limit / top.clamp_min(1e-30)).unsqueeze(1)
    return (wide.round() if dtype == torch.int8 else wide).to(dtype), top / limit


def gate_product(x: Tensor, activation: str) -> Tensor:
    """activation(first half of each row) * second half. x: [T, 2 n] -> [T, n]; activation: one of ACTIVATIONS."""
    if x.is_cuda:
        from penstock.kernels.triton import activation as triton

        if activation in triton.KINDS:
            return triton.gate_product(x, triton.KINDS[activation])
    gate, up = x.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def _gelu(x: Tensor) -> Tensor:
    return native.gelu(x, tanh=False) if native.can_gelu(x) else F.gelu(x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return native.gelu(x, tanh=True) if native.can_gelu(x) else F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_10": lambda x: F.gelu(x).clamp_(-10, 10),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square_(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": torch.clone,  # what follows may write into it
}
