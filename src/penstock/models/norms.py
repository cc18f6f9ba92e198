"""Norms of a decoder with their weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels.norms import layer_norm, rms_norm
from penstock.kernels.products import RowNorm


class Norm(Protocol):
    """A norm over the last axis."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class RmsNorm:
    """weight: [n]"""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


@dataclass(frozen=True)
class LayerNorm:
    """weight, bias: [n] or None."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class NormOfEach:
    """A norm without weights, then weights of each head's own. weight: [heads, dim]"""

    norm: Norm
    weight: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x) * self.weight


@dataclass(frozen=True)
class NormOfAll:
    """A norm over the heads of a token as one vector. x: [T, heads, dim]"""

    norm: Norm

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(1)).view(x.shape)


@dataclass(frozen=True)
class NormOfOdd:
    """A norm over the first `dim` dimensions of a head; the one that follows stays zero."""

    norm: Norm
    dim: int

    def __call__(self, x: Tensor) -> Tensor:
        return F.pad(self.norm(x[..., : self.dim].contiguous()), (0, 1))


def row_norm(norm: Norm | None) -> RowNorm | None:
    """A norm as a product takes it; None where there is none, or one that no product takes."""
    if not isinstance(norm, (RmsNorm, LayerNorm)) or norm.weight is None or norm.weight.dtype != torch.bfloat16:
        return None
    if isinstance(norm, RmsNorm):
        return RowNorm("rms", norm.weight, None, norm.eps)
    return RowNorm("layer", norm.weight, norm.bias, norm.eps)
