"""Numbers as TGI prints them: 32-bit floats in their shortest decimal form."""

from __future__ import annotations

import math
import struct

_SINGLE = struct.Struct("f")


def shortest(value: float | None) -> float | None:
    """The double whose shortest form is that of the 32-bit float; None for NaN and infinities.

    A JSON encoder that prints doubles shortest then prints the float shortest.
    """
    if value is None or not math.isfinite(value):
        return None
    single = rounded(value)
    if single == int(single):
        return single
    for digits in (7, 8, 6, 9):
        candidate = float(f"{single:.{digits}g}")
        if rounded(candidate) == single:
            # Seven digits may be one more than it takes; trailing zeros vanish in the double anyway.
            return candidate
    return single


def rounded(value: float) -> float:
    """The nearest 32-bit float; infinities where it does not fit."""
    try:
        found: float = _SINGLE.unpack(_SINGLE.pack(value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return found
