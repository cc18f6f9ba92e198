"""The engine alone: batches of equal prompts, prefill and decode timed apart, as text-generation-benchmark does.

For each batch size some runs that are not recorded, then those that are. A run adds the whole batch and steps the
engine: *prefill* lasts until every row has its first token, *decode (total)* from there until the last row has all of
its tokens, and *decode (token)* is that over its steps, one less than the decode length.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from penstock.bench.statistics import Summary, table
from penstock.devices.probe import MachineLimits
from penstock.engine.loop import EngineLoop
from penstock.engine.report import RunReport
from penstock.engine.request import EngineRequest, Sampling
from penstock.errors import PenstockError

GREEDY = Sampling()
STEPS = ("Prefill", "Decode (token)", "Decode (total)")


@dataclass(frozen=True)
class Workload:
    """What is run. Lengths in tokens; decode_length counts the token that prefill makes, so it is two at least."""

    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    sequence_length: int = 10
    decode_length: int = 8
    runs: int = 10
    warmups: int = 1
    top_n_tokens: int = 0
    sampling: Sampling = GREEDY

    @property
    def steps(self) -> int:
        """Decode steps of a run."""
        return self.decode_length - 1


@dataclass(frozen=True)
class Run:
    """One recorded run: seconds, and what its decode steps moved and computed on the way."""

    batch_size: int
    prefill: float
    decode: float
    prefill_flops: float
    decode_bytes: float
    decode_flops: float


@dataclass
class Batch:
    """The runs of one batch size and what they come to. Latencies in milliseconds, throughputs in tokens a second."""

    batch_size: int
    latency: dict[str, Summary]
    throughput: dict[str, Summary]
    prefill_flops_per_second: float
    decode_bytes_per_second: float
    decode_flops_per_second: float

    @classmethod
    def of(cls, workload: Workload, runs: Sequence[Run]) -> Batch:
        size, steps = runs[0].batch_size, workload.steps
        prefill, decode = [r.prefill for r in runs], [r.decode for r in runs]
        return cls(
            size,
            {
                "Prefill": Summary.of(1e3 * s for s in prefill),
                "Decode (token)": Summary.of(1e3 * s / steps for s in decode),
                "Decode (total)": Summary.of(1e3 * s for s in decode),
            },
            {
                "Prefill": Summary.of(size * workload.sequence_length / s for s in prefill),
                "Decode": Summary.of(size * steps / s for s in decode),
            },
            sum(r.prefill_flops for r in runs) / sum(prefill),
            sum(r.decode_bytes for r in runs) / sum(decode),
            sum(r.decode_flops for r in runs) / sum(decode),
        )


@dataclass
class StaticResult:
    """A whole benchmark, or as much of it as was done."""

    model: str
    dtype: str
    weight_size: float
    workload: Workload
    batches: list[Batch] = field(default_factory=list)
    machine: MachineLimits | None = None
    report: RunReport | None = None

    @property
    def flops_limit(self) -> float | None:
        return self.machine.flops_of(self.weight_size) if self.machine else None


def run_batches(engine: EngineLoop, workload: Workload) -> Iterator[Run | None]:
    """Every run of the workload in order, None for one that warms up. Raises PenstockError when a row fails."""
    for size in workload.batch_sizes:
        for number in range(workload.warmups + workload.runs):
            run = _run(engine, workload, size, number)
            yield run if number >= workload.warmups else None


def _run(engine: EngineLoop, workload: Workload, size: int, seed: int) -> Run:
    draw = random.Random(seed)  # noqa: S311 (not a secret)
    for row in range(size):
        ids = [draw.randrange(engine.limits.vocab_size) for _ in range(workload.sequence_length)]
        engine.add(
            EngineRequest(
                row,
                ids,
                workload.decode_length,
                workload.sampling,
                ignore_eos=True,
                top_n_tokens=workload.top_n_tokens,
            )
        )
    started: set[int] = set()
    before = engine.stats.totals.work
    since = time.perf_counter()
    prefill = 0.0
    middle = before
    while engine.has_work:
        for output in engine.step().outputs:
            if output.error is not None:
                raise PenstockError("a row of the benchmark failed", output.error)
            started.add(output.id)
        if not prefill and len(started) == size:
            prefill, middle = time.perf_counter() - since, engine.stats.totals.work
    decode = time.perf_counter() - since - prefill
    after = engine.stats.totals.work
    return Run(
        size, prefill, decode, middle.flops - before.flops, after.bytes - middle.bytes, after.flops - middle.flops
    )


def parameters_table(result: StaticResult, options: Sequence[tuple[str, str]]) -> str:
    """What was run, in the words and the order of text-generation-benchmark."""
    w = result.workload
    rows = [
        ("Parameter", "Value"),
        ("Model", result.model),
        ("Sequence Length", str(w.sequence_length)),
        ("Decode Length", str(w.decode_length)),
        ("Top N Tokens", f"Some({w.top_n_tokens})" if w.top_n_tokens else "None"),
        ("N Runs", str(w.runs)),
        ("Warmups", str(w.warmups)),
        *options,
    ]
    return table(rows)


def latency_table(result: StaticResult) -> str:
    """Milliseconds of each step and batch size."""
    rows = [["Step", "Batch Size", "Average", "Lowest", "Highest", "p50", "p90", "p99"]]
    for step in STEPS:
        for i, batch in enumerate(result.batches):
            s = batch.latency[step]
            values = (s.average, s.lowest, s.highest, s.p50, s.p90, s.p99)
            rows.append(["" if i else step, str(batch.batch_size), *(f"{value:.2f} ms" for value in values)])
    return table(rows)


def throughput_table(result: StaticResult) -> str:
    """Tokens a second of each step and batch size."""
    rows = [["Step", "Batch Size", "Average", "Lowest", "Highest"]]
    for step in ("Prefill", "Decode"):
        for i, batch in enumerate(result.batches):
            s = batch.throughput[step]
            values = (s.average, s.lowest, s.highest)
            rows.append(["" if i else step, str(batch.batch_size), *(f"{value:.2f} tokens/secs" for value in values)])
    return table(rows)


def limits_table(result: StaticResult) -> str:
    """What share of the machine's measured limits each batch size reaches."""
    if result.machine is None or result.flops_limit is None:
        return ""
    read, limit = result.machine.read_bytes_per_second, result.flops_limit
    shares = [f"of {read / 1e9:.1f} GB/s", "TFLOP/s", f"of {limit / 1e12:.2f} TFLOP/s"]
    rows = [["Step", "Batch Size", "tokens/s", "GB/s", *shares]]
    for i, b in enumerate(result.batches):
        flops, rate = b.prefill_flops_per_second, b.throughput["Prefill"].average
        reached = ["", "", f"{flops / 1e12:.3f}", f"{flops / limit:.0%}"]
        rows.append(["" if i else "Prefill", str(b.batch_size), f"{rate:.1f}", *reached])
    for i, b in enumerate(result.batches):
        moved, flops, rate = b.decode_bytes_per_second, b.decode_flops_per_second, b.throughput["Decode"].average
        reached = [f"{moved / 1e9:.2f}", f"{moved / read:.0%}", f"{flops / 1e12:.3f}", f"{flops / limit:.0%}"]
        rows.append(["" if i else "Decode", str(b.batch_size), f"{rate:.1f}", *reached])
    return table(rows)


def csv_rows(result: StaticResult) -> Iterator[list[str]]:
    """The latencies and throughputs, a line a step and batch size; the first is the head."""
    yield ["step", "batch_size", "unit", "count", "average", "lowest", "highest", "p50", "p90", "p99"]
    for batch in result.batches:
        for unit, summaries in (("ms", batch.latency), ("tokens/s", batch.throughput)):
            for step, s in summaries.items():
                values = (s.average, s.lowest, s.highest, s.p50, s.p90, s.p99)
                yield [step, str(batch.batch_size), unit, str(s.count), *(f"{value:.4f}" for value in values)]
