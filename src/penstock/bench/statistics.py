"""Averages and percentiles of samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Summary:
    """Of samples of one kind, in their unit; NaN where there are none."""

    count: int
    average: float
    lowest: float
    highest: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, samples: Iterable[float]) -> Summary:
        values = sorted(samples)
        if not values:
            return cls(0, *(math.nan,) * 6)
        p50, p90, p99 = (percentile(values, p) for p in PERCENTILES)
        return cls(len(values), math.fsum(values) / len(values), values[0], values[-1], p50, p90, p99)


def percentile(ordered: Sequence[float], p: float) -> float:
    """The value at index floor(p/100 * n) of ordered values, as text-generation-benchmark takes it; NaN without any."""
    index = math.floor(p * len(ordered) / 100)
    return ordered[min(index, len(ordered) - 1)] if ordered else math.nan


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
