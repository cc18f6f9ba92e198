"""Rotary position embedding and its scalings (Su et al. 2021; YaRN: Peng et al. 2023; LongRoPE: Ding et al. 2024;
Llama 3.1).

Every variant is one operation: each pair (i, i + dim / 2) of a head is turned by an angle. Dimensions that are not
rotated turn by zero, and weights are arranged at load so that the pairs lie that way (`arrangement`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeConfig:
    """How positions turn into angles.

    kind: none (no angle at all), default, linear, dynamic, yarn, llama3, longrope; the rest as config.json has it.
    sections: where a token has three places (time, height, width), how many pairs turn by each (Qwen2-VL 2024).
    rotary_dim: the first so many dimensions of a head are rotated; None for all, negative for the last so many.
    neighbours: the pairs of a checkpoint are (2i, 2i + 1) instead of (i, i + rotary_dim / 2). restarts: with longrope,
    whether everything is computed anew when a sequence passes the original context.
    """

    theta: float = 10000.0
    rotary_dim: int | None = None
    neighbours: bool = False
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
    short_factors: tuple[float, ...] = ()  # longrope, one for each pair
    long_factors: tuple[float, ...] = ()
    restarts: bool = False
    sections: tuple[int, ...] = ()

    @property
    def span_limit(self) -> int | None:
        """The context beyond which angles depend on more than the position; None where they never do."""
        return self.original_max_positions if self.kind in ("dynamic", "longrope") else None


NO_ROTATION = RopeConfig(kind="none")


def arrangement(dim: int, rotary_dim: int | None, neighbours: bool, width: int | None = None) -> list[int] | None:
    """Which dimension of a checkpoint's head comes where, so that pairs lie half a head apart; None for as they are.

    width: of the head as it is laid out, even; -1 stands for a dimension that is always zero. For q and k alike, so
    that their products stay what they are.
    """
    width = width or dim
    count = 2 * (-(-abs(dim if rotary_dim is None else rotary_dim) // 2))
    start = dim + rotary_dim if rotary_dim is not None and rotary_dim < 0 else 0
    turned = list(range(start, start + count)) if rotary_dim != 0 else []
    first, second = (turned[::2], turned[1::2]) if neighbours else (turned[: count // 2], turned[count // 2 :])
    rest = [d for d in range(dim) if d not in set(turned)] + [-1] * (width - dim)
    half = len(rest) // 2
    order = first + rest[:half] + second + rest[half:]
    return None if order == list(range(dim)) else order


def inverse_frequencies(rope: RopeConfig, dim: int) -> tuple[Tensor, float]:
    """Angle per position of each pair of dimensions, [dim/2] float32, and the factor on cos and sin."""
    base = 1.0 / rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    if rope.kind == "linear":
        return base / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, base), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, base, dim)
    if rope.kind == "longrope":
        return base / torch.tensor(rope.short_factors), _longrope_scale(rope)
    return base, 1.0


def _longrope_scale(rope: RopeConfig) -> float:
    """The factor on cos and sin that makes up for the flatter attention over a stretched context."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))


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
    """Cosines and sines for any position: a table for the common case, computed on the fly past it.

    dim: of a head as it is laid out in the cache, even or, where nothing is rotated, odd.
    """

    def __init__(
        self,
        rope: RopeConfig,
        dim: int,
        head_dim: int,
        max_positions: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        self.rope, self.dim, self.dtype = rope, dim, dtype
        self.rotary_dim = 0 if rope.kind == "none" else abs(head_dim if rope.rotary_dim is None else rope.rotary_dim)
        if self.rotary_dim == 0:
            self._cos = torch.ones(1, dim, dtype=dtype, device=device)
            self._sin = torch.zeros(1, dim, dtype=dtype, device=device)
            return
        frequencies, self._scale = inverse_frequencies(rope, self.rotary_dim)
        cos, sin = self._turns(torch.outer(torch.arange(max_positions).float(), frequencies))
        self._cos, self._sin = cos.to(device), sin.to(device)

    def __call__(self, positions: Tensor, spans: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin, each [T, 1, dim]. positions: [T], or [3, T] where each section of a head has its own.

        spans: [T], or None. With dynamic scaling and LongRoPE the angle also depends on the length that the sequence
        had when the token was first computed; `spans` is that length, so that a recomputed token turns by the same
        angle.
        """
        if self.rotary_dim == 0:
            shape = (len(positions), 1, self.dim)
            return self._cos.expand(shape[::2]).reshape(shape), self._sin.expand(shape[::2]).reshape(shape)
        if positions.dim() == 2:
            return self._by_section(self._cos, positions), self._by_section(self._sin, positions)
        cos, sin = self._cos[positions], self._sin[positions]
        limit = self.rope.span_limit
        if spans is not None and limit is not None:
            long = spans > limit
            if bool(long.any()):
                angles = self._dynamic if self.rope.kind == "dynamic" else self._long
                cos[long], sin[long] = self._turns(angles(positions[long], spans[long]))
        return cos.unsqueeze(1), sin.unsqueeze(1)

    def _by_section(self, table: Tensor, positions: Tensor) -> Tensor:
        """Each section of both halves of a head from the row of its own place. positions: [3, T] -> [T, 1, dim]."""
        parts = table[positions].split(list(self.rope.sections) * 2, dim=2)
        return torch.cat([part[i % 3] for i, part in enumerate(parts)], dim=1).unsqueeze(1)

    def _turns(self, angles: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of a head from the angles of its rotated pairs. angles: [n, pairs] -> two [n, dim]."""
        still = angles.new_zeros(len(angles), self.dim // 2 - angles.shape[1])
        halves = []
        for function, rest in ((torch.cos, still + 1), (torch.sin, still)):
            half = torch.cat((function(angles) * self._scale, rest), dim=1)
            halves.append(torch.cat((half, half), dim=1).to(self.dtype))
        return halves[0], halves[1]

    def _dynamic(self, positions: Tensor, spans: Tensor) -> Tensor:
        """NTK-aware scaling: the base grows with the span. positions, spans: [n] -> angles [n, pairs]."""
        dim = self.rotary_dim
        ratio = self.rope.factor * spans.double() / self.rope.original_max_positions - (self.rope.factor - 1)
        theta = self.rope.theta * ratio ** (dim / (dim - 2))
        exponent = torch.arange(0, dim, 2, device=spans.device).double() / dim
        return positions.float().unsqueeze(1) * (1.0 / theta.unsqueeze(1) ** exponent).float()

    def _long(self, positions: Tensor, _spans: Tensor) -> Tensor:
        """LongRoPE past the original context: the same angles for all of it. positions: [n] -> angles [n, pairs]."""
        longer = replace(self.rope, short_factors=self.rope.long_factors)
        return positions.float().unsqueeze(1) * inverse_frequencies(longer, self.rotary_dim)[0].to(positions.device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + dim/2) by its angle. x: [T, heads, dim]; cos, sin: [T, 1, dim]."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos).addcmul_(torch.cat((-second, first), dim=-1), sin)
