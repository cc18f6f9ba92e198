"""Which answer counts for each row, found in the journals.

Where a row has several (a life that was thought gone went on), the choice does not depend on when one looks: the mark
of a done shard is a link to the journal of the life that completed it, and so says which claim was the last. Of the
lives up to that one, a later one counts before an earlier: it answered only what it had found open. Nothing here
relies on a listing: every file is opened by a name that follows from the number of its shard.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from penstock.batch.farm.journal import JournalReader, RowDone, first_event
from penstock.batch.farm.manifest import Shard
from penstock.batch.farm.past import SET_ASIDE
from penstock.batch.farm.spool import Spool
from penstock.errors import EnvironmentFault

_OPEN_FILES = 500


class Audit(msgspec.Struct, kw_only=True):
    """What the spool holds for each row of the input. All but `shards`, `lives` and `torn_bytes` count rows.

    lost: rows of done shards without an answer, which must not be; open: rows that are still to be answered; repeated:
    answers that do not count because the row has another; foreign: answers of rows that the farm does not have, or
    under another id; damaged: lines of journals that are no event; torn_bytes: what killed lives left after their
    last whole line.
    """

    rows: int
    answered: int = 0
    open: int = 0
    lost: int = 0
    failed: int = 0
    aside: int = 0
    repeated: int = 0
    foreign: int = 0
    damaged: int = 0
    torn_bytes: int = 0
    shards: int = 0
    shards_done: int = 0
    lives: int = 0
    changed_shards: list[int] = []

    @property
    def sound(self) -> bool:
        """Whether nothing is there that the protocol excludes."""
        return not (self.lost or self.foreign or self.damaged or self.changed_shards)

    @property
    def complete(self) -> bool:
        """Whether every row has its answer."""
        return self.answered == self.rows


@dataclass
class Answers:
    """Where the answer of every row lies. journal: index in `journals`, -1 for none; offset, size: of its line."""

    journals: list[Path]
    journal: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    profiles: list[str] = field(default_factory=list)


class Finder:
    """Finds the answers of all rows, and counts what it sees in `audit`."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._index: dict[str, int] = {}  # life: its number
        self._order: dict[int, list[int]] = {}  # shard: its lives, the last claimant first
        self._done: set[int] = set()  # shards that were done when their claims were followed
        rows = spool.total
        self.answers = Answers([], np.full(rows, -1, np.int32), np.zeros(rows, np.int64), np.zeros(rows, np.int32))
        self.audit = Audit(rows=rows, shards=len(spool.shards))
        self._rank = np.full(rows, 2**30, np.int32)  # place of the chosen answer's life among the shard's; least wins

    def find(self) -> None:
        """Follow every shard's claims, then read every journal once."""
        for shard in self._spool.shards:
            self._order[shard.number] = self._lives(shard)
        for number, path in enumerate(self.answers.journals):
            reader = JournalReader(path)
            for offset, size, event in reader.read():
                if isinstance(event, RowDone):
                    self._take(number, offset, size, event)
            self.audit.damaged += reader.damaged
            self.audit.torn_bytes += reader.torn()
        self.audit.lives = len(self._index)
        self.audit.answered = int((self.answers.journal >= 0).sum())
        self.audit.shards_done = len(self._done)
        self._count_lost()
        self.audit.open = self.audit.rows - self.audit.answered - self.audit.lost

    def _lives(self, shard: Shard) -> list[int]:
        """The lives that had a shard, the last that counts first. Raises EnvironmentFault for a gap in its names."""
        done = _stat(self._spool.done(shard.number))
        if done is not None:
            self._done.add(shard.number)
        found: list[int] = []
        number = 0
        while True:
            claim = self._spool.claim(shard.number, number)
            life = self._life(claim)
            if life is None:
                break
            found.insert(0, life)
            number += 1
            if done is not None and _stat(claim) == done:
                return found
        if done is not None:
            raise EnvironmentFault(
                f"Shard {shard.number} is done, but {claim.name} is not to be seen in {self._spool.path}.",
                "File systems over a network may show new names late.",
                "Run the same command again in a minute.",
            )
        return found

    def _life(self, claim: Path) -> int | None:
        try:
            fd = os.open(claim, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            begin = first_event(fd)
        finally:
            os.close(fd)
        if begin is None:
            raise EnvironmentFault(f"{claim} is not a journal.", "Something else has written to the folder.")
        if begin.life not in self._index:
            self._index[begin.life] = len(self._index)
            self.answers.journals.append(claim)
            self.answers.profiles.append(begin.profile)
        return self._index[begin.life]

    def _take(self, life: int, offset: int, size: int, event: RowDone) -> None:
        if not 0 <= event.shard < len(self._spool.shards) or not 0 <= event.row < self._spool.shards[event.shard].rows:
            self.audit.foreign += 1
            return
        order = self._order[event.shard]
        if life not in order:  # it claimed the shard when that was done already
            self.audit.repeated += 1
            return
        row, rank = self._spool.shards[event.shard].first + event.row, order.index(life)
        if self.answers.journal[row] >= 0:
            self.audit.repeated += 1
        if rank < self._rank[row]:
            self._rank[row] = rank
            self.answers.journal[row], self.answers.offset[row], self.answers.size[row] = life, offset, size

    def _count_lost(self) -> None:
        """Rows without an answer in shards that are marked as done."""
        for shard in self._spool.shards:
            answered = int((self.answers.journal[shard.first : shard.first + shard.rows] >= 0).sum())
            if shard.number in self._done:
                self.audit.lost += shard.rows - answered


def answer_lines(spool: Spool, answers: Answers) -> Iterator[bytes | None]:
    """The result of every row as JSON, None for a row without one. Several models or formats: it names its profile."""
    several = bool(spool.manifest.record.parameters.get("profiles"))
    decoder = msgspec.json.Decoder(RowDone)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in answers.journals[:_OPEN_FILES]]
        for journal, offset, size in zip(answers.journal, answers.offset, answers.size, strict=True):
            if journal < 0:
                yield None
                continue
            if journal < len(files):
                line = os.pread(files[journal].fileno(), int(size), int(offset))
            else:
                with answers.journals[journal].open("rb") as file:
                    line = os.pread(file.fileno(), int(size), int(offset))
            result = bytes(decoder.decode(line).result)
            if several:
                result = result[:-1] + b',"profile":' + msgspec.json.encode(answers.profiles[journal]) + b"}"
            yield result


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


class ResultHead(msgspec.Struct):
    """The part of a result that is looked at here."""

    id: int | str
    hash: str | None = None
    error: str | None = None

    @property
    def aside(self) -> bool:
        """Whether its row was not run again because workers died on it."""
        return self.error is not None and self.error.startswith(SET_ASIDE)


RESULT_HEAD = msgspec.json.Decoder(ResultHead)
