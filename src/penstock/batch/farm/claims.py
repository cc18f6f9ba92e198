"""Claims: who works on which shard, by hard links and nothing else.

Claim n of a shard is the name `SHARD.n`. Making a hard link is atomic on every file system that nodes share, without
a lock service, and fails when the name is there; so exactly one life gets each name. No name is ever removed or
replaced. The shard is its latest claimant's until that life has ended or gives no sign (lease.py); then whoever makes
the next name has it.

A listing of the folder only says where to try first: one that comes late costs tries, and no shard.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

from penstock.batch.farm.journal import Claim, JournalReader, JournalWriter, make_durable
from penstock.batch.farm.lease import Judge
from penstock.batch.farm.manifest import Shard
from penstock.batch.farm.past import Past, past_of
from penstock.batch.farm.spool import Spool

_MISSES = 8  # names found taken before the folder is listed again


@dataclass(frozen=True)
class Claimed:
    """A shard that is ours, and what earlier lives left of it."""

    shard: Shard
    number: int
    past: Past


class Claims:
    """The claims of one life."""

    def __init__(self, spool: Spool, journal: JournalWriter, judge: Judge, life: str) -> None:
        self._spool, self._journal, self._judge = spool, journal, judge
        shards = len(spool.shards)
        start = zlib.crc32(life.encode()) % shards  # lives begin at different places, so that they seldom meet
        self._fresh = [*range(start, shards), *range(start)][::-1]
        self._latest: dict[int, int] = {}  # shards that are claimed and not known to be done: the number of the claim
        self._mine: set[int] = set()
        self._listed = False

    def next(self) -> Claimed | None:
        """A shard that nobody has, or one whose holder is gone; None while there is none. Raises OSError."""
        return self._claim_fresh() or self._claim_again()

    def finish(self, shard: Shard) -> None:
        """Say that a shard is complete; all of its rows are on disk. Another life may have said so already."""
        try:
            os.link(self._journal.path, self._spool.done(shard.number))
        except FileExistsError:
            pass
        self._mine.discard(shard.number)

    def complete(self) -> bool:
        """Whether every shard is done. To be asked when `next` has found nothing."""
        return not self._fresh and not self._latest and not self._mine

    def _claim_fresh(self) -> Claimed | None:
        misses = _MISSES
        while self._fresh:
            if misses >= _MISSES:
                self._skip_listed()
                misses = 0
                continue
            number = self._fresh[-1]
            mine = self._link(number, 0)
            self._fresh.pop()
            if mine:
                return self._begin(number, 0)
            self._latest[number] = 0
            misses += 1
        return None

    def _skip_listed(self) -> None:
        """Drop the shards that a listing shows as claimed, if it shows any."""
        if self._listed and len(self._fresh) <= _MISSES:
            return
        self._listed = True
        names = set(self._spool.names())
        fresh = []
        for number in self._fresh:
            if f"{number:06}.done" in names:
                continue
            if f"{number:06}.0" in names:
                self._latest[number] = 0
            else:
                fresh.append(number)
        self._fresh = fresh

    def _claim_again(self) -> Claimed | None:
        for shard, seen in list(self._latest.items()):
            if self._spool.done(shard).exists():
                del self._latest[shard]
                continue
            latest = seen
            while self._spool.claim(shard, latest + 1).exists():
                latest += 1
            self._latest[shard] = latest
            if not self._judge.is_over(self._spool.claim(shard, latest)):
                continue
            if not self._link(shard, latest + 1):
                continue  # another life was faster, or its claim was not to be seen yet
            del self._latest[shard]
            if not self._spool.done(shard).exists():  # its holder may have come to the end just before
                return self._begin(shard, latest + 1)
        return None

    def _link(self, shard: int, number: int) -> bool:
        """Make a claim. Over NFS the answer may get lost and the call come twice, so that ours is there already."""
        claim = self._spool.claim(shard, number)
        try:
            os.link(self._journal.path, claim)
        except FileExistsError:
            return _inode(claim) == self._journal.inode
        return True

    def _begin(self, shard: int, number: int) -> Claimed:
        self._mine.add(shard)
        self._journal.append([Claim(at=self._journal.now(), shard=shard, number=number)])
        before = [self._spool.claim(shard, earlier) for earlier in range(number)]
        for journal in before:
            make_durable(journal)  # we build on what is in it, and its writer may have died before it was on disk
        past = past_of(shard, ([event for _, _, event in JournalReader(journal).read()] for journal in before))
        return Claimed(self._spool.shards[shard], number, past)


def _inode(path: Path) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return -1
