"""The dense MLP of a layer: gated, or plain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from penstock.formats.dense import Gated, Linear
from penstock.kernels.norms import ACTIVATIONS


class Mlp(Protocol):
    """What follows attention in a layer."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [T, hidden] -> [T, hidden], plus `residual` where it is given."""
        ...


@dataclass(frozen=True)
class GatedMlp:
    """down(activation(gate(x)) * up(x))"""

    gate_up: Gated
    down: Linear

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.down(self.gate_up(x), residual)


@dataclass(frozen=True)
class PlainMlp:
    """down(activation(up(x)))"""

    up: Linear
    activation: str
    down: Linear

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.up(x)), residual)
