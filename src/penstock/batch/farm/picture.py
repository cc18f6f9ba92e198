"""The plots of a run as a picture file, with matplotlib."""

from __future__ import annotations

from pathlib import Path

from penstock.batch.farm.ledger import Ledger
from penstock.batch.farm.plots import plots_of
from penstock.batch.farm.report import COLOURS, KINDS
from penstock.batch.farm.stats import FarmStats
from penstock.batch.farm.status import server_now
from penstock.errors import EnvironmentFault


def draw(ledger: Ledger, stats: FarmStats, file: Path) -> None:
    """Throughput, time line and latency in one picture. Raises EnvironmentFault."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise EnvironmentFault(
            "Pictures are drawn by matplotlib, which is not installed.",
            "The HTML report needs nothing.",
            "pip install 'penstock[plot]'",
        ) from None
    plots = plots_of(ledger, server_now(ledger.spool))
    figure = Figure(figsize=(10, 8 + len(plots.rows) * 0.15), layout="constrained")
    flow, line, latency = figure.subplots(3, 1)
    times = [i * plots.step for i in range(max((len(v) for v in plots.throughput.values()), default=0))]
    if times:
        flow.stackplot(times, *plots.throughput.values(), labels=list(plots.throughput), colors=list(COLOURS))
        flow.legend(loc="upper left")
    flow.set(ylabel="tokens/s", xlabel="s", title=f"{stats.tokens:,} tokens, {stats.tokens_per_second:,.0f} tokens/s")
    for bar in plots.bars:
        line.barh(bar.row, bar.end - bar.start, left=bar.start, color=KINDS[bar.kind], height=0.8)
    for row, when, _ in plots.ends:
        line.plot(when, row, "x", color="#c0392b")
    line.set_yticks(range(len(plots.rows)), plots.rows)
    line.invert_yaxis()
    line.set(xlabel="s")
    if plots.latency:
        edges = [low for low, _, _ in plots.latency] + [plots.latency[-1][1]]
        latency.stairs([count for _, _, count in plots.latency], edges, fill=True, color=COLOURS[0])
        latency.set(xscale="log", xlabel="seconds of a row in the engine", ylabel="rows")
    try:
        figure.savefig(file, dpi=110)
    except (OSError, ValueError) as error:
        raise EnvironmentFault(f"{file} cannot be written: {error}.") from None
