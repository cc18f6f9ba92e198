"""The data of a run's three plots: throughput over time, lives on a time line by node, latency of rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

from penstock.batch.farm.ledger import LATENCY_STEPS, Ledger, Life

BINS = 120  # points of the throughput


@dataclass(frozen=True)
class Bar:
    """A stretch of a life. kind: loading, working or waiting. row: the line of the time line it is drawn on."""

    row: int
    kind: str
    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Plots:
    """Seconds count from `begun`. throughput: by partition, tokens a second for each bin of `step` seconds; rows: the
    names of the time line's rows; latency: (from, to, rows)."""

    begun: float
    seconds: float
    step: float
    throughput: dict[str, list[float]]
    rows: list[str]
    bars: list[Bar]
    ends: list[tuple[int, float, str]]  # (row, when, why) of lives that ended badly
    latency: list[tuple[float, float, int]]


BAD = ("crashed", "killed", "failed", "full", "silent", "asked")


def plots_of(ledger: Ledger, now: float) -> Plots:
    """Collect them from a ledger that was updated. now: by the file server's clock."""
    lives = sorted(ledger.lives.values(), key=lambda life: (life.begin.place.node, life.begin.at))
    begun = min((life.begin.at for life in lives), default=now)
    seconds = max(max((life.until for life in lives), default=begun) - begun, 1.0)
    step = max(1.0, seconds / BINS)
    rows, bars, ends = _time_line(lives, begun, now, ledger.spool.manifest.timing.lease)
    return Plots(
        begun, seconds, step, _throughput(lives, begun, seconds, step), rows, bars, ends, _latency(ledger.latency)
    )


def _throughput(lives: list[Life], begun: float, seconds: float, step: float) -> dict[str, list[float]]:
    count = int(seconds / step) + 1
    found: dict[str, list[float]] = defaultdict(lambda: [0.0] * count)
    for life in lives:
        line = found[life.begin.place.partition]
        for second, tokens in life.tokens_at.items():
            line[min(count - 1, max(0, int((second - begun) / step)))] += tokens / step
    return dict(sorted(found.items()))


def _time_line(
    lives: list[Life], begun: float, now: float, lease: float
) -> tuple[list[str], list[Bar], list[tuple[int, float, str]]]:
    """Rows by node; lives that overlap on a node get rows of their own."""
    rows: list[str] = []
    free: dict[str, list[tuple[int, float]]] = defaultdict(list)  # rows of each node, and until when they are taken
    bars: list[Bar] = []
    ends: list[tuple[int, float, str]] = []
    for life in lives:
        node = life.begin.place.node
        row = next((row for row, until in free[node] if until <= life.begin.at), None)
        if row is None:
            row = len(rows)
            rows.append(node)
        free[node] = [(r, u) for r, u in free[node] if r != row] + [(row, life.until)]
        name = f"{life.begin.life}: {life.rows} rows, {life.tokens} tokens, {life.state(now, lease)}"
        loaded = life.loaded.at if life.loaded is not None else life.until
        worked = max(loaded, life.last_row)
        for kind, start, end in (
            ("loading", life.begin.at, loaded),
            ("working", loaded, worked),
            ("waiting", worked, life.until),
        ):
            if end > start:
                bars.append(Bar(row, kind, start - begun, end - begun, name))
        if life.state(now, lease) in BAD:
            ends.append((row, life.until - begun, life.state(now, lease)))
    return rows, bars, ends


def _latency(bins: Counter[int]) -> list[tuple[float, float, int]]:
    if not bins:
        return []
    return [
        (2 ** (number / LATENCY_STEPS), 2 ** ((number + 1) / LATENCY_STEPS), bins[number])
        for number in range(min(bins), max(bins) + 1)
    ]
