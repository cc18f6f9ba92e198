"""What a load test looks like: the figures that HTML and PNG show, and the HTML with its plots inside."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.bench.load_report import markdown
from penstock.bench.session import LoadResult
from penstock.errors import EnvironmentFault

COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#b8860b", "#6a4c93", "#444444")
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 560, 300, 62, 46, 30, 14
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """Lines over one axis. marks: show each point."""

    title: str
    x: str
    y: str
    lines: dict[str, Points]
    marks: bool = False


def plots(result: LoadResult) -> list[Plot]:
    """Latencies and throughput over the levels where there are several, and each level's output over time."""
    found = []
    stages = result.stages
    if len(stages) > 1:
        levels = [float(s.concurrency if s.rate is None else s.rate) for s in stages]  # type: ignore[arg-type]
        x = "streams" if stages[0].rate is None else "requests/s asked for"
        rates = [s.output_tokens_per_second for s in stages]
        found.append(Plot("Throughput", x, "output tokens/s", {"output": list(zip(levels, rates, strict=True))}, True))
        for title, name in (("Time to first token", "ttft"), ("Inter-token latency", "itl"), ("End to end", "e2e")):
            lines = {
                p: list(zip(levels, (getattr(getattr(s, name), p) for s in stages), strict=True))
                for p in ("p50", "p90", "p99")
            }
            found.append(Plot(title, x, "ms", lines, True))
        trade = [(s.output_tokens_per_second, s.itl.p50) for s in stages]
        found.append(
            Plot("Latency against throughput", "output tokens/s", "inter-token p50, ms", {"levels": trade}, True)
        )
    for title, name in (("Time to first token", "ttft"), ("Inter-token latency", "itl"), ("End to end", "e2e")):
        lines = {}
        for s in stages:
            v = getattr(s, name)
            lines[s.level] = [(0, v.lowest), (50, v.p50), (90, v.p90), (99, v.p99), (100, v.highest)]
        found.append(Plot(f"{title}, percentiles", "percentile", "ms", lines, True))
    over_time: dict[str, Points] = {s.level: [(float(t), float(n)) for t, n in s.timeline] for s in stages}
    found.append(Plot("Output over time", "second", "tokens in that second", over_time))
    return [plot for plot in found if any(_finite(points) for points in plot.lines.values())]


def write_html(result: LoadResult, file: Path) -> None:
    """One file that needs no other: the tables and the plots. Raises EnvironmentFault."""
    title = f"Load on {result.model or result.url}"
    asked = f"{result.url}, {result.api}, {result.prompt}, {result.new_tokens} new tokens"
    body = "\n".join(_svg(plot) for plot in plots(result))
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        "<style>body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1180px;padding:0 1em}"
        "pre{overflow-x:auto;background:#f5f5f3;padding:1em;font-size:13px}svg{margin:4px}</style>\n"
        f"<h1>{html.escape(title)}</h1><p>{html.escape(asked)}</p>\n{body}\n"
        f"<pre>{html.escape(markdown(result))}</pre></html>\n"
    )
    try:
        file.write_text(page, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{file} cannot be written: {error.strerror}.") from None


def write_png(result: LoadResult, file: Path) -> None:
    """The same plots as one picture. Raises EnvironmentFault, also where matplotlib is missing."""
    require_matplotlib()
    from matplotlib.figure import Figure

    shown = plots(result)
    rows = max(1, -(-len(shown) // 2))
    figure = Figure(figsize=(12, 3.6 * rows), layout="constrained")
    places = list(figure.subplots(rows, 2, squeeze=False).flat)
    for unused in places[len(shown) :]:
        unused.set_visible(False)
    for axes, plot in zip(places, shown, strict=False):
        for colour, (name, points) in zip(COLOURS * len(plot.lines), plot.lines.items(), strict=False):
            xs, ys = [x for x, _ in _finite(points)], [y for _, y in _finite(points)]
            axes.plot(xs, ys, label=name, color=colour, marker="o" if plot.marks else None, markersize=3)
        axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y, ylim=(0, None))
        axes.legend(fontsize=8)
    try:
        figure.savefig(file, format="png", dpi=110)
    except OSError as error:
        raise EnvironmentFault(f"{file} cannot be written: {error.strerror}.") from None


def require_matplotlib() -> None:
    """Raises EnvironmentFault where it is not installed."""
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise EnvironmentFault(
            "PNG needs matplotlib.", "It is not installed.", "pip install 'penstock[plot]'; --html needs nothing"
        )


def _svg(plot: Plot) -> str:
    """A plot as inline SVG, both axes from zero (x from its lowest value)."""
    points = [point for line in plot.lines.values() for point in _finite(line)]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    top = _round_up(max(y for _, y in points)) or 1.0
    wide, tall = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + wide * ((x - low) / (high - low) if high > low else 0.5), TOP + tall * (1 - y / top)

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-size="11" role="img">']
    parts.append(f'<text x="{LEFT}" y="16" font-size="14" font-weight="bold">{html.escape(plot.title)}</text>')
    for i in range(5):
        value = top * i / 4
        y = at(low, value)[1]
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.4g}</text>')
    for value in _ticks(low, high):
        x = at(value, 0)[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:,.4g}</text>')
    parts.append(f'<text x="{LEFT + wide / 2}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(plot.x)}</text>')
    middle = TOP + tall / 2
    turned = f'x="14" y="{middle}" transform="rotate(-90 14 {middle})" text-anchor="middle"'
    parts.append(f"<text {turned}>{html.escape(plot.y)}</text>")
    for i, (name, line) in enumerate(plot.lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        drawn = [at(x, y) for x, y in _finite(line)]
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{_path(drawn)}"/>')
        if plot.marks:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in drawn]
        y = TOP + 12 + 14 * i
        parts.append(f'<text x="{LEFT + 8}" y="{y}" fill="{colour}">{html.escape(name)}</text>')
    return "".join(parts) + "</svg>"


def _finite(points: Points) -> Points:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 times a power of ten."""
    if value <= 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * 0.999999)


def _ticks(low: float, high: float) -> list[float]:
    return [low] if high <= low else [low + (high - low) * i / 4 for i in range(5)]
