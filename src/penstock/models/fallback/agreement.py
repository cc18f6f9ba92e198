"""Whether two ways of computing the same scores agree."""

from __future__ import annotations

import torch
from torch import Tensor

EXACT = 1e-3  # of the root mean square of the scores: what float32, or the same operations once more, may differ by
_HALF = 0.03  # the same in types of half the bytes, where other operations round otherwise in every layer


def tolerance(dtype: torch.dtype) -> float:
    """How far the scores of two right ways may lie apart, see `difference`."""
    return EXACT if dtype == torch.float32 else _HALF


def difference(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, as a share of that of what is expected. NaN where either has one."""
    wrong, whole = (found.double() - expected.double()).square().mean(), expected.double().square().mean()
    return float((wrong / whole.clamp(min=1e-12)).sqrt())
