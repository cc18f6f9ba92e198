"""Self-attention of one layer, up to its output projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.formats.dense import Linear
from penstock.kernels.attention import paged_attention, rotate_into_cache
from penstock.models.inputs import StepInputs, Wanted
from penstock.models.norms import Norm


class Qkv(Protocol):
    """The way from a layer's input to queries, keys and values that are not rotated yet."""

    def __call__(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h: [T, hidden] -> q [T, heads, dim], k and v [T, kv_heads, dim]."""
        ...


@dataclass(frozen=True)
class FusedQkv:
    """One product for all three. clip: largest magnitude of a result, or None."""

    product: Linear
    heads: int
    kv_heads: int
    dim: int
    q_norm: Norm | None
    k_norm: Norm | None
    clip: float | None

    def __call__(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.product(h).view(len(h), -1, self.dim)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (x.clamp(-self.clip, self.clip) for x in (q, k, v))
        return q, k, v


@dataclass(frozen=True)
class LatentQkv:
    """Multi-head latent attention (DeepSeek-V2 2024), its keys and values written out for every head.

    query: the products from h to q, with a norm between two of them. down: to the latent vector and the rotated part of
    a key; up: from the latent vector to the rest of each key and the value.
    """

    query: tuple[Linear | Norm, ...]
    down: Linear
    norm: Norm
    up: Linear
    heads: int
    dim: int
    rotary_dim: int
    value_dim: int

    def __call__(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = h
        for part in self.query:
            q = part(q)
        latent, turned = self.down(h).tensor_split((-self.rotary_dim,), dim=1)
        kv = self.up(self.norm(latent.contiguous())).view(len(h), self.heads, -1)
        still, v = kv.tensor_split((-self.value_dim,), dim=2)
        turned = turned.unsqueeze(1).expand(-1, self.heads, -1)
        still = F.pad(still, (0, self.dim - self.rotary_dim - still.shape[2]))
        halves = zip(turned.tensor_split(2, dim=2), still.tensor_split(2, dim=2), strict=True)
        k = torch.cat([part for half in halves for part in half], dim=2)
        return q.view(len(h), self.heads, -1), k, F.pad(v, (0, self.dim - self.value_dim))


@dataclass(frozen=True)
class Attention:
    """scale, window, softcap, chunk, alibi: see `paged_attention`. temperature: (floor, scale) of a factor on queries
    that grows with the logarithm of the position (Nakanishi 2025), or None."""

    qkv: Qkv
    scale: float
    window: int | None
    softcap: float | None
    chunk: int | None
    alibi: Tensor | None
    temperature: tuple[float, float] | None

    def __call__(
        self,
        h: Tensor,
        turn: tuple[Tensor, Tensor],
        step: StepInputs,
        wanted: Wanted | None,
        kv: tuple[Tensor, Tensor],
    ) -> Tensor:
        """h: [T, hidden]; turn: cos and sin of every row; kv: the layer's cache -> [T or R, heads * dim]."""
        q, k, v = self.qkv(h)
        if self.temperature is not None:
            floor, scale = self.temperature
            factor = torch.log1p(torch.floor((step.positions.float() + 1) / floor)) * scale + 1
            q = (q * factor.view(-1, 1, 1)).to(q.dtype)
        q = rotate_into_cache(q, k, v, *turn, step.slots, *kv)
        groups = step.groups
        if wanted is not None:
            q, groups = q[wanted.rows], wanted.groups
        return paged_attention(
            q, *kv, groups, self.scale, self.window, softcap=self.softcap, chunk=self.chunk, alibi=self.alibi
        )
