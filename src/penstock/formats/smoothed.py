"""Products whose matrix has taken over a share of its input's range.

Channel j of the input is divided by a factor and column j of the matrix multiplied by it before it is quantized
(SmoothQuant, Xiao et al. 2023). The result is the same, and 8 bits lose less of it where few channels are much larger
than all others.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock.formats.dense import Gated, Linear


@dataclass(frozen=True)
class Smoothed:
    """inverse: [in] what each channel of the input is multiplied by, a power of two; the matrix has the factors."""

    product: Linear
    inverse: Tensor

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.product(x * self.inverse, residual)


@dataclass(frozen=True)
class SmoothedGated:
    """The same of the two matrices of a gated MLP."""

    product: Gated
    inverse: Tensor

    @property
    def activation(self) -> str:
        return self.product.activation

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x * self.inverse)

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.product.halves(x * self.inverse)
