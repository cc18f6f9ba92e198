"""Choosing among scores."""

from __future__ import annotations

from torch import Tensor

from penstock.kernels import native


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score of each row and its place; NaN where a row has one. scores: [n, vocab] -> two [n]."""
    if native.can_find_largest(scores):
        return native.largest(scores)
    best, ids = scores.max(dim=-1)
    return best, ids
