"""How weights are stored and multiplied: one module a format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from penstock.formats import dense, fp8, int4, int8
from penstock.formats.dense import Gated, Linear


@dataclass(frozen=True)
class Format:
    """load and load_gated: see dense. weight_bytes: of one weight of a matrix; None is the size of the working type."""

    load: Callable[..., Linear]
    load_gated: Callable[..., Gated]
    weight_bytes: float | None


FORMATS = {
    "none": Format(dense.load, dense.load_gated, None),
    "fp8": Format(fp8.load, fp8.load_gated, 1),
    "int8": Format(int8.load, int8.load_gated, 1),
    "int4": Format(int4.load, int4.load_gated, 0.5625),
}
