"""A load test as Markdown tables and as CSV."""

from __future__ import annotations

import math
from collections.abc import Iterator

from penstock.bench.session import LoadResult
from penstock.bench.statistics import Summary, table


def markdown(result: LoadResult) -> str:
    """What happened at each level: outcomes, rates, latencies, the share of the machine."""
    head = ["Load", "ok", "refused", "failed", "cancelled", "s", "requests/s", "output tokens/s", "prompt tokens/s"]
    rows = [head + (["good/s", "good"] if result.slo.asked else [])]
    for s in result.stages:
        counts = [str(s.outcomes.get(name, 0)) for name in ("ok", "refused", "failed", "cancelled")]
        rates = [f"{s.seconds:.1f}", f"{s.requests_per_second:.2f}", f"{s.output_tokens_per_second:,.1f}"]
        prompt = "-" if s.prompt_tokens_per_second is None else f"{s.prompt_tokens_per_second:,.1f}"
        good = [] if s.good_share is None else [f"{s.good_requests_per_second:.2f}", f"{s.good_share:.0%}"]
        rows.append([s.level, *counts, *rates, prompt, *good])
    latencies = [["Load", "Latency", "Average", "Lowest", "Highest", "p50", "p90", "p99"]]
    for s in result.stages:
        for i, (name, values) in enumerate(
            (("first token", s.ttft), ("inter-token", s.itl), ("end to end", s.e2e), ("sent late", s.lateness))
        ):
            latencies.append(["" if i else s.level, name, *(_ms(value) for value in figures(values))])
    parts = [table(rows), table(latencies), limits(result)]
    parts += [f"{s.level}: {n} x {error}" for s in result.stages for error, n in s.errors.items()]
    parts.append("The generator took " + ", ".join(f"{s.generator_cpu:.0%}" for s in result.stages) + " of a core.")
    if not all(s.tokens_told for s in result.stages):
        parts.append("The server did not tell how many tokens it made: chunks were counted instead.")
    return "\n\n".join(part for part in parts if part)


def limits(result: LoadResult) -> str:
    """The share of the machine's limits, where the server tells what it moved and runs on this machine."""
    if result.machine is None or result.flops_limit is None:
        return ""
    read, limit = result.machine.read_bytes_per_second, result.flops_limit
    rows = [["Load", "tokens/s", "GB/s", f"of {read / 1e9:.1f} GB/s", "TFLOP/s", f"of {limit / 1e12:.2f} TFLOP/s"]]
    for s in result.stages:
        if s.bytes_per_second is not None and s.flops_per_second is not None:
            moved, flops = s.bytes_per_second, s.flops_per_second
            shares = [f"{moved / 1e9:.2f}", f"{moved / read:.0%}", f"{flops / 1e12:.3f}", f"{flops / limit:.0%}"]
            rows.append([s.level, f"{s.output_tokens_per_second:,.1f}", *shares])
    return table(rows) if len(rows) > 1 else ""


def figures(s: Summary) -> tuple[float, ...]:
    return s.average, s.lowest, s.highest, s.p50, s.p90, s.p99


def _ms(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f} ms"


def csv_rows(result: LoadResult) -> Iterator[list[str]]:
    """A line a level; the first is the head. Latencies in milliseconds."""
    kinds = ("ttft", "itl", "e2e")
    names = ("average", "lowest", "highest", "p50", "p90", "p99")
    counts = ("ok", "refused", "failed", "cancelled")
    head = ["load", *counts, "seconds", "requests_per_second", "output_tokens_per_second", "good_share"]
    yield head + [f"{kind}_{name}" for kind in kinds for name in names]
    for s in result.stages:
        row = [s.level, *(str(s.outcomes.get(name, 0)) for name in counts), f"{s.seconds:.3f}"]
        row += [f"{s.requests_per_second:.4f}", f"{s.output_tokens_per_second:.4f}"]
        row.append("" if s.good_share is None else f"{s.good_share:.4f}")
        yield row + [f"{value:.4f}" for kind in kinds for value in figures(getattr(s, kind))]
