"""What a farm cost and where its time went, from its journals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import msgspec

from penstock.batch.farm.ledger import LATENCY_STEPS, Ledger, Life

HOUR = 3600.0
MILLION = 1e6


class GroupStats(msgspec.Struct, frozen=True):
    """A node, a partition or the whole farm. All but rates and counts are hours.

    tokens: generated, those of repeated rows included. tokens_per_second: while a model was in memory. node_hours: the
    time in which at least one worker was on a node; a node's GPUs and cores count for each worker that had them.
    """

    name: str
    workers: int
    lives: int
    rows: int
    tokens: int
    tokens_per_second: float
    node_hours: float
    gpu_hours: float
    core_hours: float


class Lost(msgspec.Struct, frozen=True):
    """Worker-seconds that made no tokens. queue: from the submission of a job to its worker's first sign; restart: from
    the last sign of a worker that was preempted, killed or lost to the next one in its place; waiting: with a model in
    memory and nothing to claim; repeated_rows: answers that were made twice."""

    queue: float
    staging: float
    loading: float
    restart: float
    waiting: float
    repeated_rows: int


class FarmStats(msgspec.Struct, frozen=True):
    """The run report. Hours per million are of tokens that count. Latency: seconds that a row was in the engine."""

    rows: int
    done: int
    failed: int
    tokens: int
    prompt_tokens: int
    seconds: float
    tokens_per_second: float
    node_hours_per_million: float | None
    gpu_hours_per_million: float | None
    core_hours_per_million: float | None
    latency_p50: float | None
    latency_p95: float | None
    total: GroupStats
    partitions: list[GroupStats]
    nodes: list[GroupStats]
    lost: Lost


def stats_of(ledger: Ledger, submitted: Mapping[str, float]) -> FarmStats:
    """The figures of a ledger that was updated. submitted: when each array job was, by the file server's clock."""
    lives = sorted(ledger.lives.values(), key=lambda life: life.begin.at)
    total = _group("all", lives)
    begun = min((life.begin.at for life in lives), default=0.0)
    ended = max((life.last_row for life in lives), default=begun)
    seconds = max(ended - begun, 0.0)
    millions = ledger.tokens / MILLION
    return FarmStats(
        rows=ledger.spool.total,
        done=ledger.rows,
        failed=len(ledger.failed),
        tokens=ledger.tokens,
        prompt_tokens=ledger.prompt_tokens,
        seconds=round(seconds, 1),
        tokens_per_second=round(ledger.tokens / seconds, 1) if seconds else 0.0,
        node_hours_per_million=_per(total.node_hours, millions),
        gpu_hours_per_million=_per(total.gpu_hours, millions),
        core_hours_per_million=_per(total.core_hours, millions),
        latency_p50=quantile(ledger, 0.5),
        latency_p95=quantile(ledger, 0.95),
        total=total,
        partitions=_groups(lives, [life.begin.place.partition for life in lives]),
        nodes=_groups(lives, [life.begin.place.node for life in lives]),
        lost=_lost(ledger, lives, submitted),
    )


def quantile(ledger: Ledger, share: float) -> float | None:
    """Seconds below which this share of the rows stayed, to an eighth of an octave."""
    wanted, seen = share * sum(ledger.latency.values()), 0
    for number in sorted(ledger.latency):
        seen += ledger.latency[number]
        if seen >= wanted:
            return float(f"{2 ** ((number + 0.5) / LATENCY_STEPS):.3g}")
    return None


def _groups(lives: list[Life], names: list[str]) -> list[GroupStats]:
    groups: dict[str, list[Life]] = defaultdict(list)
    for life, name in zip(lives, names, strict=True):
        groups[name].append(life)
    return [_group(name, groups[name]) for name in sorted(groups)]


def _group(name: str, lives: list[Life]) -> GroupStats:
    tokens = sum(life.tokens for life in lives)
    by_node: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for life in lives:
        by_node[life.begin.place.node].append((life.begin.at, life.until))
    loaded = covered((life.loaded.at, life.until) for life in lives if life.loaded is not None)
    spans = [(life, max(0.0, life.until - life.begin.at)) for life in lives]
    return GroupStats(
        name=name,
        workers=len({_worker(life) for life in lives}),
        lives=len(lives),
        rows=sum(life.rows for life in lives),
        tokens=tokens,
        tokens_per_second=round(tokens / loaded, 1) if loaded else 0.0,
        node_hours=sum(covered(spans) for spans in by_node.values()) / HOUR,
        gpu_hours=sum(span * life.begin.place.gpus for life, span in spans) / HOUR,
        core_hours=sum(span * life.begin.place.cpus for life, span in spans) / HOUR,
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in at least one span."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _worker(life: Life) -> tuple[str, int]:
    """What stays the same when a worker begins a new life: its job, or its node, and its rank."""
    place = life.begin.place
    return place.job or f"{place.node}/{life.begin.life.partition('.')[0]}", place.rank


def _lost(ledger: Ledger, lives: list[Life], submitted: Mapping[str, float]) -> Lost:
    queue = restart = waiting = 0.0
    before: dict[tuple[str, int], Life] = {}
    for life in lives:
        worker, place = _worker(life), life.begin.place
        earlier = before.get(worker)
        if earlier is not None:
            restart += max(0.0, life.begin.at - earlier.until)
        elif place.job is not None:
            at = submitted.get(place.job.partition("_")[0])
            queue += max(0.0, life.begin.at - at) if at is not None else 0.0
        before[worker] = life
        if life.loaded is not None:
            waiting += max(0.0, life.until - max(life.last_row, life.loaded.at))
    loaded = [life.loaded for life in lives if life.loaded is not None]
    return Lost(
        queue=round(queue, 1),
        staging=round(sum(event.staging for event in loaded), 1),
        loading=round(sum(event.loading for event in loaded), 1),
        restart=round(restart, 1),
        waiting=round(waiting, 1),
        repeated_rows=ledger.repeated,
    )


def _per(hours: float, millions: float) -> float | None:
    return hours / millions if millions else None


def table(found: FarmStats) -> list[str]:
    """The figures as lines for people."""
    groups = [found.total, *found.partitions, *found.nodes]
    width = max(len(group.name) for group in groups)
    lines = [f"{'':<{width}}  {'WORKERS':>7} {'ROWS':>9} {'TOKENS':>12} {'TOKENS/S':>9} {'NODE-H':>8} {'GPU-H':>8}"]
    lines += [
        f"{group.name:<{width}}  {group.workers:>7} {group.rows:>9,} {group.tokens:>12,} "
        f"{group.tokens_per_second:>9,.0f} {group.node_hours:>8.3f} {group.gpu_hours:>8.3f}"
        for group in groups
    ]
    cost = [
        f"{value:.3g} {unit}-hours"
        for value, unit in (
            (found.node_hours_per_million, "node"),
            (found.gpu_hours_per_million, "GPU"),
            (found.core_hours_per_million, "core"),
        )
        if value
    ]
    lost = found.lost
    lines.append(f"a million tokens cost {', '.join(cost) or 'nothing yet'}")
    lines.append(
        f"worker-seconds lost: queue {lost.queue:,.1f}, staging {lost.staging:,.1f}, loading {lost.loading:,.1f}, "
        f"preemption and restarts {lost.restart:,.1f}, waiting {lost.waiting:,.1f}; "
        f"{lost.repeated_rows:,} rows done twice"
    )
    if found.latency_p50 is not None:
        lines.append(f"a row took {found.latency_p50:g} s in the middle, 95 % at most {found.latency_p95:g} s")
    return lines
