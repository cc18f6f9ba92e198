"""Claims and leases: one holder a shard, whatever the clocks, the listings and the answers of the file system say."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.batch.farm.claims import Claims
from penstock.batch.farm.journal import Begin, End, JournalWriter, Place
from penstock.batch.farm.lease import Judge
from penstock.batch.farm.manifest import Timing
from penstock.batch.farm.spool import Spool
from tests.batch.farms import FAST, a_place, make_farm

HOUR = 3600.0
ELSEWHERE = {"host": "another host", "process": "1@1"}


class Holder:
    """A life without an engine, on a node of its own unless told otherwise."""

    def __init__(self, spool: Spool, name: str, place: Place | None = None, running: object = None) -> None:
        self.journal = JournalWriter(spool.journal(name), 0.0)
        place = place or a_place(host=name, process="1@1")
        self.journal.append([Begin(at=self.journal.now(), life=name, profile="", place=place)])
        judge = Judge(place, spool.manifest.timing, self.journal.now, lambda: running)  # type: ignore[arg-type,return-value]
        self.claims = Claims(spool, self.journal, judge, name)

    def end(self, reason: str = "asked") -> None:
        self.journal.append([End(at=self.journal.now(), reason=reason)])


def shift_clock(spool: Spool, life: str, seconds: float) -> None:
    """As if the life's node stamped its files by a clock that is off."""
    path = spool.journal(life)
    os.utime(path, (time.time() + seconds,) * 2)


def test_every_shard_goes_to_one_of_many_that_ask_at_once(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 400, shard_rows=1)
    holders = [Holder(spool, f"life{i}") for i in range(8)]

    def take_all(holder: Holder) -> list[int]:
        found = []
        while claimed := holder.claims.next():
            found.append(claimed.shard.number)
        return found

    with ThreadPoolExecutor(8) as pool:
        taken = [number for numbers in pool.map(take_all, holders) for number in numbers]
    assert sorted(taken) == list(range(400))


@pytest.mark.parametrize("lateness", ["empty", "random", "all but claims"])
def test_a_listing_that_comes_late_costs_no_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lateness: str
) -> None:
    spool, rng, names = make_farm(tmp_path, 120, shard_rows=2), random.Random(1), Spool.names

    def late(self: Spool) -> list[str]:
        if lateness == "empty":
            return []
        if lateness == "random":
            return [name for name in names(self) if rng.random() < 0.4]
        return [name for name in names(self) if name.endswith((".jsonl", ".done"))]

    monkeypatch.setattr(Spool, "names", late)
    holders = [Holder(spool, f"life{i}") for i in range(3)]
    taken: list[int] = []
    while any(found := [holder.claims.next() for holder in holders]):
        for holder, claimed in zip(holders, found, strict=True):
            if claimed is not None:
                taken.append(claimed.shard.number)
                if rng.random() < 0.5:
                    holder.claims.finish(claimed.shard)
    assert sorted(taken) == list(range(60))


def test_a_lost_answer_to_a_link_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS may carry out a call whose answer gets lost, and answer the repeated one that the name exists."""
    spool, link = make_farm(tmp_path, 10, shard_rows=1), os.link

    def lossy(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError

    first, second = Holder(spool, "first"), Holder(spool, "second")
    monkeypatch.setattr(os, "link", lossy)
    taken = [first.claims.next() for _ in range(10)]
    monkeypatch.setattr(os, "link", link)
    assert sorted(claimed.shard.number for claimed in taken if claimed) == list(range(10))
    assert second.claims.next() is None


def test_who_hands_back_is_followed_at_once(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 4, shard_rows=4)
    first, second = Holder(spool, "first"), Holder(spool, "second")
    assert first.claims.next() is not None
    assert second.claims.next() is None
    first.end()
    claimed = second.claims.next()
    assert claimed is not None
    assert claimed.number == 1
    assert not second.claims.complete()
    second.claims.finish(claimed.shard)
    assert second.claims.complete()


@pytest.mark.parametrize("off", [0.0, -HOUR, HOUR])
def test_a_silent_life_loses_its_shard_after_the_lease_whatever_its_clock(tmp_path: Path, off: float) -> None:
    timing = Timing(lease=0.4, beat=0.05)
    spool = make_farm(tmp_path, 4, shard_rows=4, timing=timing)
    first, second = Holder(spool, "first"), Holder(spool, "second")
    assert first.claims.next() is not None
    since = time.monotonic()
    shift_clock(spool, "first", off)
    while second.claims.next() is None:
        assert time.monotonic() - since < 3
        time.sleep(0.02)
    # a clock behind makes the life look old at once, but it was watched for two beats before it was believed
    assert time.monotonic() - since >= (0.1 if off < 0 else 0.4)


@pytest.mark.parametrize("off", [0.0, -HOUR, HOUR])
def test_a_life_that_beats_keeps_its_shard_whatever_its_clock(tmp_path: Path, off: float) -> None:
    spool = make_farm(tmp_path, 4, shard_rows=4, timing=Timing(lease=0.4, beat=0.1))
    first, second = Holder(spool, "first"), Holder(spool, "second")
    assert first.claims.next() is not None
    for beat in range(20):
        shift_clock(spool, "first", off + beat * 1e-3)
        assert second.claims.next() is None
        time.sleep(0.05)


def test_slurm_says_running_and_a_silent_life_gets_more_time(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 2, shard_rows=1, timing=Timing(lease=0.1, beat=0.02))
    place = a_place(job="17_3", **ELSEWHERE)
    first = Holder(spool, "first", place)
    assert first.claims.next() is not None
    assert first.claims.next() is not None
    shift_clock(spool, "first", -0.5)
    patient, hasty = Holder(spool, "patient", running={"17_3"}), Holder(spool, "hasty", running={"18"})
    until = time.monotonic() + 0.4
    while time.monotonic() < until:
        assert patient.claims.next() is None
        time.sleep(0.02)
    since = time.monotonic()
    while hasty.claims.next() is None:  # its job is gone: a lease is enough
        assert time.monotonic() - since < 0.5
        time.sleep(0.01)
    since = time.monotonic()
    while patient.claims.next() is None:  # ten leases are enough in any case
        assert time.monotonic() - since < 3
        time.sleep(0.02)


def test_a_job_that_slurm_runs_again_does_not_protect_its_earlier_life(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 2, shard_rows=1, timing=Timing(lease=0.1, beat=0.02))
    first = Holder(spool, "first", a_place(job="17", restart=0, **ELSEWHERE))
    again = Holder(spool, "again", a_place(job="17", restart=1, host="a third host", process="1@1"))
    assert first.claims.next() is not None
    assert again.claims.next() is not None
    judge = Holder(spool, "judge", running={"17"})
    shift_clock(spool, "first", -1)
    found, until = None, time.monotonic() + 1
    while found is None and time.monotonic() < until:
        again.journal.beat()
        found = judge.claims.next()
        time.sleep(0.02)
    assert found is not None


def test_a_process_of_this_host_that_is_gone_is_known_at_once(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 1, shard_rows=1)
    mine = a_place()
    first = Holder(spool, "first", a_place(process=f"{os.getpid()}@1"))  # the number is taken, by a younger process
    assert first.claims.next() is not None
    assert Holder(spool, "second", mine).claims.next() is not None


def test_a_shard_that_is_done_is_claimed_by_nobody(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 8, shard_rows=1, timing=FAST)
    first = Holder(spool, "first")
    while claimed := first.claims.next():
        first.claims.finish(claimed.shard)
    first.end()
    second = Holder(spool, "second")
    assert second.claims.next() is None
    assert second.claims.complete()
