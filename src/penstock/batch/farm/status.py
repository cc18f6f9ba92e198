"""The state of a farm at one moment, from its folder and, where Slurm is, one call of squeue."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections import Counter
from collections.abc import Mapping

import msgspec

from penstock.batch.farm.ledger import Ledger, Life
from penstock.batch.farm.spool import Spool

WINDOW = 60.0  # seconds over which the present rate is taken
_ERRORS = 5  # of a kind that is shown
_BAD_ENDS = ("crashed", "killed", "failed", "full")


class WorkerStatus(msgspec.Struct, frozen=True):
    """One life that has not ended. seen: seconds since its last sign."""

    life: str
    node: str
    partition: str
    job: str | None
    state: str
    shards: int
    rows: int
    tokens: int
    tokens_per_second: float
    seen: float


class GroupStatus(msgspec.Struct, frozen=True):
    """All lives of a node or a partition. rows, tokens: of ended lives too; jobs_waiting: by Slurm."""

    name: str
    workers: int
    rows: int
    tokens: int
    tokens_per_second: float
    jobs_waiting: int = 0


class Status(msgspec.Struct, frozen=True):
    """done: rows with a result, `failed` of them with an error, `aside` of those for killing workers. seconds_left is
    None while no rate is known. repeated: rows answered more than once, of which one answer counts."""

    folder: str
    model: str
    rows: int
    done: int
    failed: int
    aside: int
    repeated: int
    shards: int
    shards_done: int
    complete: bool
    cancelled: bool
    tokens: int
    rows_per_second: float
    tokens_per_second: float
    seconds_left: float | None
    jobs_running: int
    jobs_waiting: int
    nodes: list[GroupStatus]
    partitions: list[GroupStatus]
    workers: list[WorkerStatus]
    ends: dict[str, int]  # lives that ended, by reason
    failures: list[str]


def server_now(spool: Spool) -> float:
    """The file server's clock; ours where the folder cannot be written to."""
    probe = spool.folder / f".clock-{secrets.token_hex(4)}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def status_of(ledger: Ledger, waiting: Mapping[str, int] | None = None, running: int = 0) -> Status:
    """Read what is new and say how it stands. waiting: jobs in Slurm's queue, by partition; running: those that run."""
    ledger.update()
    spool, waiting = ledger.spool, waiting or {}
    now, lease = server_now(spool), spool.manifest.timing.lease
    lives = sorted(ledger.lives.values(), key=lambda life: (life.begin.place.partition, life.begin.place.node))
    workers = [_worker(life, now, lease) for life in lives if life.end is None]
    rows_per_second = sum(_rate(life, life.rows_at, now) for life in lives)
    left = spool.total - ledger.rows
    record = spool.manifest.record
    return Status(
        folder=str(spool.folder),
        model=record.model,
        rows=spool.total,
        done=ledger.rows,
        failed=len(ledger.failed),
        aside=len(ledger.aside),
        repeated=ledger.repeated,
        shards=len(spool.shards),
        shards_done=len(ledger.done_shards),
        complete=len(ledger.done_shards) == len(spool.shards),
        cancelled=spool.cancelled(),
        tokens=ledger.tokens,
        rows_per_second=round(rows_per_second, 3),
        tokens_per_second=round(sum(_rate(life, life.tokens_at, now) for life in lives), 1),
        seconds_left=0.0 if left == 0 else round(left / rows_per_second, 1) if rows_per_second > 0 else None,
        jobs_running=running,
        jobs_waiting=sum(waiting.values()),
        nodes=_groups(lives, [life.begin.place.node for life in lives], now, lease, {}),
        partitions=_groups(lives, [life.begin.place.partition for life in lives], now, lease, waiting),
        workers=workers,
        ends=dict(Counter(life.end.reason for life in lives if life.end is not None)),
        failures=_failures(ledger, lives, now, lease),
    )


def _worker(life: Life, now: float, lease: float) -> WorkerStatus:
    place = life.begin.place
    return WorkerStatus(
        life=life.begin.life,
        node=place.node,
        partition=place.partition,
        job=place.job,
        state=life.state(now, lease),
        shards=len(life.open),
        rows=life.rows,
        tokens=life.tokens,
        tokens_per_second=round(_rate(life, life.tokens_at, now), 1),
        seen=round(max(0.0, now - life.seen), 1),
    )


def _groups(
    lives: list[Life], names: list[str], now: float, lease: float, waiting: Mapping[str, int]
) -> list[GroupStatus]:
    found = []
    for name in sorted({*names, *waiting}):
        members = [life for life, group in zip(lives, names, strict=True) if group == name]
        found.append(
            GroupStatus(
                name=name,
                workers=sum(life.alive(now, lease) for life in members),
                rows=sum(life.rows for life in members),
                tokens=sum(life.tokens for life in members),
                tokens_per_second=round(sum(_rate(life, life.tokens_at, now) for life in members), 1),
                jobs_waiting=waiting.get(name, 0),
            )
        )
    return found


def _rate(life: Life, at: Counter[int], now: float) -> float:
    """Per second over the window, or over the life where that is shorter. An ended life has none."""
    if life.end is not None or life.loaded is None:
        return 0.0
    since = max(now - WINDOW, life.loaded.at)
    return sum(count for second, count in at.items() if second >= int(since)) / max(now - since, 1.0)


def _failures(ledger: Ledger, lives: list[Life], now: float, lease: float) -> list[str]:
    """Sentences for people: workers that died or fell silent, errors of rows, the most frequent first."""
    found: Counter[str] = Counter()
    for life in lives:
        place = life.begin.place
        if life.end is not None and life.end.reason in _BAD_ENDS:
            detail = life.end.detail.splitlines()[0] if life.end.detail else ""
            found[f"workers on {place.node} {life.end.reason}{f': {detail}' if detail else ''}"] += 1
        elif life.end is None and life.state(now, lease) == "silent":
            found[f"workers on {place.node} give no sign any more"] += 1
    sentences = [f"{count} x {text}" for text, count in found.most_common(_ERRORS)]
    errors = Counter(ledger.failed.values())
    return sentences + [f"{count} x row: {text}" for text, count in errors.most_common(_ERRORS)]
