"""Rotary position embedding and its scalings (Su et al. 2021; YaRN: Peng et al. 2023; Llama 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles. kind: default, linear, dynamic, yarn, llama3; the rest as config.json has it."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0  # context the checkpoint was trained with before scaling
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


def inverse_frequencies(rope: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions, [dim/2] float32, and the factor on cos and sin."""
    base = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if rope.kind == "linear":
        return base / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, base), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, base, dim)
    return base, 1.0


def _llama3(rope: RopeConfig, base: Tensor) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / base
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    between = (1 - smooth) * base / rope.factor + smooth * base
    scaled = torch.where(wavelength > longest, base / rope.factor, base)
    return torch.where((wavelength <= longest) & (wavelength >= shortest), between, scaled)


def _yarn(rope: RopeConfig, base: Tensor, dim: int) -> tuple[Tensor, float]:
    """Blend of kept and stretched frequencies by how often each turns within the original context."""

    def dimension_of(turns: float) -> float:
        return dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)).clamp(0, 1)
    blended = base / rope.factor * ramp + base * (1 - ramp)

    def magnitude(scale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * scale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return blended, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return blended, magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return blended, magnitude(1.0)


class Rotary:
    """Cosines and sines for any position: a table for the common case, computed on the fly past it."""

    def __init__(self, rope: RopeConfig, dim: int, max_positions: int, dtype: torch.dtype) -> None:
        self.rope, self.dim, self.dtype = rope, dim, dtype
        frequencies, scale = inverse_frequencies(rope, dim)
        angles = torch.outer(torch.arange(max_positions).float(), frequencies)  # [P, dim/2]
        angles = torch.cat((angles, angles), dim=-1)
        self._cos = (angles.cos() * scale).to(dtype)
        self._sin = (angles.sin() * scale).to(dtype)

    def __call__(self, positions: Tensor, spans: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, 1, dim]. positions: [T].

        spans: [T], or None. With dynamic scaling the angle also depends on the length that the sequence had when
        the token was first computed; `spans` is that length, so that a recomputed token turns by the same angle.
        """
        cos, sin = self._cos[positions], self._sin[positions]
        if spans is not None and self.rope.kind == "dynamic":
            long = spans > self.rope.original_max_positions
            if bool(long.any()):
                cos[long], sin[long] = self._dynamic(positions[long], spans[long])
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def _dynamic(self, positions: Tensor, spans: Tensor) -> tuple[Tensor, Tensor]:
        """NTK-aware scaling: the base grows with the span. positions, spans: [n] -> two [n, dim]."""
        ratio = self.rope.factor * spans.double() / self.rope.original_max_positions - (self.rope.factor - 1)
        theta = self.rope.theta * ratio ** (self.dim / (self.dim - 2))
        exponent = torch.arange(0, self.dim, 2).double() / self.dim
        angles = positions.float().unsqueeze(1) * (1.0 / theta.unsqueeze(1) ** exponent).float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + dim/2) by its angle. x: [T, heads, dim]; cos, sin: [T, 1, dim]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos).addcmul_(torch.cat((-second, first), dim=-1), sin)
