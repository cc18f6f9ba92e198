"""What claims cost, and whether workers stand in each other's way: the real spool, an engine that only takes time."""

from __future__ import annotations

import heapq
import time
from pathlib import Path

import pytest

from penstock.batch.farm.claims import Claims
from penstock.batch.farm.journal import Begin, Done, JournalWriter
from penstock.batch.farm.lease import Judge
from penstock.batch.farm.ledger import Ledger
from penstock.batch.farm.manifest import Timing
from tests.batch.farms import a_place, live_here, make_farm, start_life

SHARD_SECONDS = 20.0


@pytest.mark.parametrize("workers", [1, 4, 16, 64, 256])
def test_claims_cost_at_most_a_hundredth_of_the_time(tmp_path: Path, workers: int) -> None:
    """Shards of 64 prompts that take 20 s each, in simulated time: workers ask when their shard's 20 s are over, and
    what they spend in claiming, committing and marking is measured."""
    shards = max(32, 2 * workers)
    spool = make_farm(tmp_path, shards * 64, shard_rows=64, timing=Timing())
    journals = [JournalWriter(spool.journal(f"life{i}"), 0.0) for i in range(workers)]
    claims = []
    for i, journal in enumerate(journals):
        place = a_place(host=f"host{i}")
        journal.append([Begin(at=journal.now(), life=f"life{i}", profile="", place=place)])
        claims.append(Claims(spool, journal, Judge(place, spool.manifest.timing, journal.now), f"life{i}"))
    events = [(0.0, i) for i in range(workers)]
    held: dict[int, object] = {}
    cost, done, last = [0.0] * workers, 0, 0.0
    while events:
        now, worker = heapq.heappop(events)
        since = time.perf_counter()
        if worker in held:
            claimed = held.pop(worker)
            journals[worker].append([Done(at=now, shard=claimed.shard.number)])  # type: ignore[attr-defined]
            journals[worker].sync()
            claims[worker].finish(claimed.shard)  # type: ignore[attr-defined]
            done += 1
        claimed = claims[worker].next()
        spent = time.perf_counter() - since
        cost[worker] += spent
        last = max(last, now)
        if claimed is not None:
            held[worker] = claimed
            heapq.heappush(events, (now + spent + SHARD_SECONDS, worker))
    assert done == shards
    ideal = -(-shards // workers) * SHARD_SECONDS
    assert last <= 1.01 * ideal
    assert sum(cost) <= 0.01 * workers * ideal  # of each alone it would be a measure of the disk's longest pause


def test_four_nodes_do_nearly_four_times_the_work_of_one(tmp_path: Path) -> None:
    """Real processes whose engine sleeps; counted while all of them have work."""
    rates = {}
    for count in (1, 4):
        spool = make_farm(tmp_path / str(count), 128 * count, shard_rows=16, timing=Timing(commit=0.5))
        lives = [start_life(spool, f"life{i}", 0.08) for i in range(count)]
        for life in lives:
            assert life.wait(60) == 0
        ledger = Ledger(spool)
        ledger.update()
        begun = max(life.loaded.at for life in ledger.lives.values() if life.loaded)
        rates[count] = ledger.rows / (max(life.last_row for life in ledger.lives.values()) - begun)
    assert rates[4] >= 3.6 * rates[1]


def test_the_farm_costs_little_beside_any_engine(tmp_path: Path) -> None:
    """At most a tenth of a millisecond of processor time for a row: claims, journal, commits and the row itself."""
    spool = make_farm(tmp_path, 4000, shard_rows=64, timing=Timing())
    since = time.process_time()
    assert live_here(spool) == 0
    assert time.process_time() - since <= 4000 * 1e-4
