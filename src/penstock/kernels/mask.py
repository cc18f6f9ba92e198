"""Which tokens of a vocabulary may come."""

from __future__ import annotations

import numpy as np


class Mask:
    """bits: [ceil(width / 32)] uint32, one bit a token, lowest first, set where it may come. address: where they lie;
    asking NumPy for it each time takes as long as the rest of handing them over."""

    __slots__ = ("address", "bits")

    def __init__(self, width: int) -> None:
        self.bits = np.zeros(-(-width // 32), np.uint32)
        self.address: int = self.bits.ctypes.data
