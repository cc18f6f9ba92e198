"""Penstock and other engines on one model, in turn, in one run.

Every engine is a process of its own behind a small driver (benchmarks/rivals), all loaded, one at work at a time: for
each job, round after round, each engine runs it once. A ratio is taken within a round, so that what the machine does
from minute to minute falls on both sides of it.
"""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

from penstock.bench.driver import HOME, Driver, Engine
from penstock.bench.statistics import table
from penstock.devices.probe import MachineLimits, measure
from penstock.errors import PenstockError, UsageError

_JOB = re.compile(r"(\d+)x(\d+)\+(\d+)")


@dataclass(frozen=True)
class Job:
    """So many streams at once, each with a prompt of so many tokens and as many new ones. Written 8x128+64."""

    streams: int
    prompt: int
    new: int

    @classmethod
    def parse(cls, text: str) -> Job:
        match = _JOB.fullmatch(text)
        if not match or min(map(int, match.groups())) < 1:
            raise UsageError(f"{text!r} is not a job.", "", "Write STREAMSxPROMPT+NEW, for example 8x128+64.")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{self.streams}x{self.prompt}+{self.new}"

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Random token ids, the same for every engine."""
        draw = random.Random(seed)  # noqa: S311 (not a secret)
        low = min(1000, vocab_size // 2)
        return [[draw.randrange(low, vocab_size) for _ in range(self.prompt)] for _ in range(self.streams)]


@dataclass(frozen=True)
class Sample:
    """One job by one engine in one round. Rates are tokens a second: of the prompts until every stream had its first
    token, and of what came after that. read_share: of the memory's bandwidth, measured in this round, that reading the
    weights once a decode step takes."""

    engine: str
    job: str
    round: int
    prefill_rate: float
    decode_rate: float | None
    seconds: float
    read_share: float | None = None


@dataclass
class Comparison:
    """What was measured; `versions` and `load_seconds` by engine, `limits` before each round of each job."""

    model: str
    threads: int
    versions: dict[str, str] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)
    weight_bytes: dict[str, float | None] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    limits: list[MachineLimits] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def rates(self, engine: str, job: str, *, prefill: bool) -> dict[int, float]:
        """Tokens a second by round."""
        found = {
            s.round: s.prefill_rate if prefill else s.decode_rate
            for s in self.samples
            if (s.engine, s.job) == (engine, job)
        }
        return {number: rate for number, rate in found.items() if rate is not None}


def compare(
    result: Comparison,
    engines: Sequence[Engine],
    jobs: Sequence[Job],
    rounds: int,
    cache: Path,
    vocab_size: int,
    say: Callable[[str], None],
) -> None:
    """Measure, round by round, into `result`, so that what is interrupted has results too."""
    model = Path(result.model)
    running: list[Driver] = []
    with ExitStack() as ends:
        for engine in engines:
            say(f"{engine}: converting and loading")
            try:
                driver = Driver(engine, model, cache, result.threads)
            except (PenstockError, OSError) as error:
                result.errors[str(engine)] = " ".join(str(error).splitlines())
                say(f"{engine}: {result.errors[str(engine)]}")
                continue
            running.append(ends.enter_context(closing(driver)))
            result.versions[str(engine)], result.load_seconds[str(engine)] = driver.version, driver.load_seconds
            result.weight_bytes[str(engine)] = driver.weight_bytes
        for job in jobs:
            for number in range(rounds + 1):  # the first warms up
                if number:
                    result.limits.append(measure(result.threads, products=False))
                for driver in running[:: 1 if number % 2 else -1]:  # nobody always follows the same neighbour
                    sample = _sample(driver, job, number, job.prompts(vocab_size, number), result)
                    if sample is not None and number:
                        result.samples.append(sample)
                        shown = sample.decode_rate if sample.decode_rate is not None else sample.prefill_rate
                        say(f"{job} round {number}/{rounds}: {driver.engine} {shown:.1f} tokens/s")


def _sample(driver: Driver, job: Job, number: int, prompts: list[list[int]], result: Comparison) -> Sample | None:
    """One job; an engine that fails is told in the result and left out from then on."""
    if str(driver.engine) in result.errors:
        return None
    try:
        answer = driver.run(prompts, job.new)
    except PenstockError as error:
        result.errors[str(driver.engine)] = " ".join(str(error).splitlines())
        return None
    rest = answer["tokens"] - answer["first_tokens"]
    rate = rest / (answer["total"] - answer["first"]) if rest else None
    share = None
    if rate is not None and driver.weight_bytes is not None and result.limits:
        share = driver.weight_bytes * rate / job.streams / result.limits[-1].read_bytes_per_second
    return Sample(
        str(driver.engine),
        str(job),
        number,
        prefill_rate=job.streams * job.prompt / answer["first"],
        decode_rate=rate,
        seconds=answer["total"],
        read_share=share,
    )


def spread(values: Sequence[float]) -> str:
    """`median (lowest-highest)` with a sensible number of digits."""
    if not values:
        return "-"
    digits = 2 if max(values) < 20 else 1
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratios(result: Comparison, job: str, ours: str, theirs: str, *, prefill: bool) -> list[float]:
    """Ours over theirs, round by round."""
    a, b = result.rates(ours, job, prefill=prefill), result.rates(theirs, job, prefill=prefill)
    return [a[number] / b[number] for number in a if number in b]


def markdown(result: Comparison, jobs: Sequence[Job]) -> str:
    """One table a job and quantity: tokens/s of each engine, and how many times as fast each of ours is."""
    ours = [name for name in result.versions if name.partition(":")[0] == HOME]
    parts = []
    for job in jobs:
        kinds = [True] if job.new == 1 else [False] if job.prompt < 256 else [True, False]
        for prefill in kinds:
            title = "prompt tokens/s" if prefill else "decode tokens/s"
            rows = [["engine", title, "weights' share of bandwidth", *[f"{name} is x times as fast" for name in ours]]]
            for name in result.versions:
                rates = list(result.rates(name, str(job), prefill=prefill).values())
                cells = [spread(ratios(result, str(job), our, name, prefill=prefill)) for our in ours]
                shares = [s.read_share for s in result.samples if (s.engine, s.job) == (name, str(job))]
                share = [100 * value for value in shares if value is not None and not prefill]
                rows.append([name, spread(rates), f"{spread(share)} %" if share else "-", *cells])
            parts.append(
                f"### {job}: {job.streams} streams, {job.prompt} prompt tokens, {job.new} new ones\n\n{table(rows)}"
            )
    return "\n\n".join(parts)
