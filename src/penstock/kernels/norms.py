"""Normalisation and activations as plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in float32 inside. x: [..., n], weight: [n]. (Zhang & Sennrich 2019)"""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a fused projection. gate_up: [T, 2n] -> [T, n]. (Shazeer 2020)"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def activation_and_mul(gate_up: Tensor, kind: str) -> Tensor:
    """A gated MLP's activation by its Hugging Face name. gate_up: [T, 2n] -> [T, n]."""
    if kind in ("silu", "swish"):
        return silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[kind](gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}
