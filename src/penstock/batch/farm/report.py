"""The run report as one HTML file: figures, and plots drawn as SVG, with nothing to fetch."""

from __future__ import annotations

from html import escape

from penstock.batch.farm.ledger import Ledger
from penstock.batch.farm.plots import Plots, plots_of
from penstock.batch.farm.spool import Spool
from penstock.batch.farm.stats import FarmStats, GroupStats
from penstock.batch.farm.status import server_now

WIDTH, LEFT, TOP = 900, 70, 10
COLOURS = ("#1b6ca8", "#d9822b", "#3c9d5d", "#9b59b6", "#c0392b", "#7f8c8d")
KINDS = {"loading": "#d9b44a", "working": "#3c9d5d", "waiting": "#c7ced6"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 940px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .15em .8em; text-align: right; border-bottom: 1px solid #dde3e9 }
td:first-child, th:first-child { text-align: left } svg { width: 100%; height: auto } svg text { font-size: 12px }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em } code { overflow-wrap: anywhere }
@media (prefers-color-scheme: dark) { body { background: #14191f; color: #dbe2ea } td, th { border-color: #36414d }
svg text { fill: #dbe2ea } }
"""


def page(spool: Spool, ledger: Ledger, stats: FarmStats) -> str:
    """The whole document, of a ledger that was updated."""
    plots = plots_of(ledger, server_now(spool))
    record = spool.manifest.record
    title = f"Farm {spool.folder.name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(record.model)}, {escape(record.input)}: {stats.done:,} of {stats.rows:,} rows, "
        f"{stats.failed:,} with errors; {stats.tokens:,} tokens in {_time(stats.seconds)}, "
        f"{stats.tokens_per_second:,.0f} tokens/s.</p>",
        _figures(stats),
        "<h2>Throughput</h2>",
        _legend({name: COLOURS[i % len(COLOURS)] for i, name in enumerate(plots.throughput)}),
        _throughput(plots),
        "<h2>Workers</h2>",
        _legend(KINDS),
        _time_line(plots),
        "<h2>Latency of rows</h2>",
        _latency(plots),
        f"<p>Parameters: <code>{escape(str(record.parameters))}</code></p>",
    ]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _figures(stats: FarmStats) -> str:
    head = "".join(
        f"<th>{name}</th>"
        for name in ("", "workers", "lives", "rows", "tokens", "tokens/s", "node-hours", "GPU-hours", "core-hours")
    )
    rows = "".join(_row(group) for group in [stats.total, *stats.partitions, *stats.nodes])
    lost = stats.lost
    cost = ", ".join(
        f"{value:.3g} {name}-hours"
        for value, name in (
            (stats.node_hours_per_million, "node"),
            (stats.gpu_hours_per_million, "GPU"),
            (stats.core_hours_per_million, "core"),
        )
        if value
    )
    latency = ""
    if stats.latency_p50 is not None:
        latency = f" A row took {stats.latency_p50:g} s in the middle, 95 % took at most {stats.latency_p95:g} s."
    return (
        f"<table><tr>{head}</tr>{rows}</table>"
        f"<p>A million tokens cost {cost or 'nothing yet'}. Worker-seconds lost: queue {lost.queue:,.1f}, staging "
        f"{lost.staging:,.1f}, loading {lost.loading:,.1f}, preemption and restarts {lost.restart:,.1f}, waiting "
        f"{lost.waiting:,.1f}; {lost.repeated_rows:,} rows were done twice.{latency}</p>"
    )


def _row(group: GroupStats) -> str:
    cells = (
        f"{group.workers:,}",
        f"{group.lives:,}",
        f"{group.rows:,}",
        f"{group.tokens:,}",
        f"{group.tokens_per_second:,.0f}",
        *(f"{hours:.3f}" for hours in (group.node_hours, group.gpu_hours, group.core_hours)),
    )
    return f"<tr><td>{escape(group.name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _legend(colours: dict[str, str]) -> str:
    keys = (f'<span class="key" style="background:{colour}"></span>{escape(name)}' for name, colour in colours.items())
    return f"<p>{''.join(keys)}</p>"


def _throughput(plots: Plots) -> str:
    """Tokens a second over time, the partitions stacked."""
    height = 220
    count = max((len(line) for line in plots.throughput.values()), default=0)
    sums = [0.0] * count
    layers = []
    for i, line in enumerate(plots.throughput.values()):
        above = [a + b for a, b in zip(sums, line, strict=True)]
        layers.append((COLOURS[i % len(COLOURS)], list(sums), above))
        sums = above
    top = max(sums, default=0.0) or 1.0
    areas = []
    for colour, low, high in layers:
        points = [(j, value) for j, value in enumerate(high)] + [(j, low[j]) for j in reversed(range(count))]
        shape = " ".join(f"{_x(j * plots.step, plots.seconds):.1f},{_y(value, top, height):.1f}" for j, value in points)
        areas.append(f'<polygon points="{shape}" fill="{colour}" opacity="0.85"/>')
    ticks = "".join(
        f'<text x="{LEFT - 6}" y="{_y(top * part, top, height) + 4:.1f}" text-anchor="end">{top * part:,.0f}</text>'
        for part in (0, 0.5, 1)
    )
    return _svg(height, "".join(areas) + ticks + _time_axis(plots.seconds, height), "tokens a second over time")


def _time_line(plots: Plots) -> str:
    """Each life as a bar: what it did when; a cross where one ended badly."""
    line = 18
    height = TOP + line * max(1, len(plots.rows)) + 30
    parts = [
        f'<text x="{LEFT - 6}" y="{TOP + line * i + 13}" text-anchor="end">{escape(name)}</text>'
        for i, name in enumerate(plots.rows)
        if i == 0 or plots.rows[i - 1] != name
    ]
    for bar in plots.bars:
        start, end = _x(bar.start, plots.seconds), _x(bar.end, plots.seconds)
        parts.append(
            f'<rect x="{start:.1f}" y="{TOP + line * bar.row + 2}" width="{max(0.5, end - start):.1f}" '
            f'height="{line - 4}" fill="{KINDS[bar.kind]}"><title>{escape(bar.text)}</title></rect>'
        )
    for row, when, why in plots.ends:
        x, y = _x(when, plots.seconds), TOP + line * row + line / 2
        parts.append(
            f'<path d="M{x - 4:.1f} {y - 4}l8 8m0 -8l-8 8" stroke="#c0392b" stroke-width="2">'
            f"<title>{escape(why)}</title></path>"
        )
    return _svg(height, "".join(parts) + _time_axis(plots.seconds, height), "workers over time, by node")


def _latency(plots: Plots) -> str:
    """Rows by the time they were in the engine, on a logarithmic axis."""
    height = 180
    if not plots.latency:
        return "<p>No rows yet.</p>"
    top = max(count for _, _, count in plots.latency)
    width = (WIDTH - LEFT - 10) / len(plots.latency)
    parts = []
    for i, (low, high, count) in enumerate(plots.latency):
        y = _y(count, top, height)
        parts.append(
            f'<rect x="{LEFT + i * width:.1f}" y="{y:.1f}" width="{max(0.5, width - 1):.1f}" '
            f'height="{height - 30 - y:.1f}" fill="{COLOURS[0]}">'
            f"<title>{low:.3g} to {high:.3g} s: {count}</title></rect>"
        )
        if i % max(1, len(plots.latency) // 8) == 0:
            parts.append(f'<text x="{LEFT + i * width:.1f}" y="{height - 12}">{low:.2g} s</text>')
    parts.append(f'<text x="{LEFT - 6}" y="{TOP + 8}" text-anchor="end">{top:,}</text>')
    return _svg(height, "".join(parts), "latency of rows")


def _svg(height: float, content: str, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{content}</svg>'


def _time_axis(seconds: float, height: float) -> str:
    return "".join(
        f'<text x="{_x(seconds * part, seconds):.1f}" y="{height - 8}" text-anchor="middle">'
        f"{_time(seconds * part)}</text>"
        for part in (0, 0.25, 0.5, 0.75, 0.98)
    )


def _x(second: float, seconds: float) -> float:
    return LEFT + (WIDTH - LEFT - 10) * second / seconds


def _y(value: float, top: float, height: float) -> float:
    return height - 30 - (height - 30 - TOP) * value / top


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
