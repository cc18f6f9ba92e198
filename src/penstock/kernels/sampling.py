"""Choosing among scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels import native

_EXCLUDED = float("-inf")


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score of each row and its place; NaN where a row has one. scores: [n, vocab] -> two [n]."""
    if native.can_find_largest(scores):
        return native.largest(scores)
    best, ids = scores.max(dim=-1)
    return best, ids


def restrict(scores: Tensor, masks: Sequence[NDArray[np.uint32] | None], withheld: Sequence[Sequence[int]]) -> None:
    """Make -inf, in place, what must not come next in each row.

    scores: [n, vocab]; masks: n of [ceil(vocab / 32)], a bit a token, lowest first, set where it may come (None: all
    may); withheld: n lists of different ids that may not come either, unless a mask leaves a row nothing else.
    """
    if native.can_restrict(scores):
        native.restrict(scores, masks, withheld)
    else:
        restrict_plainly(scores, masks, withheld)


def restrict_plainly(
    scores: Tensor, masks: Sequence[NDArray[np.uint32] | None], withheld: Sequence[Sequence[int]]
) -> None:
    """The twin of the compiled kernel."""
    for row, mask, ids in zip(scores, masks, withheld, strict=True):
        if mask is not None:
            allowed = np.unpackbits(mask.view(np.uint8), count=len(row), bitorder="little")
            row.masked_fill_(torch.from_numpy(allowed == 0), _EXCLUDED)
        if ids:
            kept = row[list(ids)]
            row[list(ids)] = _EXCLUDED
            if (row == _EXCLUDED).all():
                row[list(ids)] = kept
