"""From journals to one output: each row of the input exactly once, in the input's order; and the audit of that.

Which answer counts where a row has several (a life that was thought gone went on) does not depend on when one looks:
the marker of a done shard is a link to the journal of the life that completed it, and so says which claim was the
last. Of the lives up to that one, a later one counts before an earlier: it answered only what it had found open.
Nothing here relies on a listing: every file is opened by a name that follows from the number of its shard.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from penstock.batch.farm.journal import JournalReader, RowDone, first_event
from penstock.batch.farm.manifest import Shard
from penstock.batch.farm.spool import Spool
from penstock.batch.lines import sync_folder
from penstock.errors import EnvironmentFault, PartialResults



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
    output: OutputAudit | None = None

    @property
    def sound(self) -> bool:
        """Whether nothing is there that the protocol excludes."""
        bad_output = self.output is not None and not self.output.sound
        return not (self.lost or self.foreign or self.damaged or self.changed_shards or bad_output)

    @property
    def complete(self) -> bool:
        """Whether every row has its answer."""
        return self.answered == self.rows


class OutputAudit(msgspec.Struct, kw_only=True):
    """A merged file against the rows. Everything but `file` and `rows` must be 0. disordered: not in their place."""

    file: str
    rows: int = 0
    missing: int = 0
    doubled: int = 0
    foreign: int = 0
    torn: int = 0
    disordered: int = 0
    different: int = 0

    @property
    def sound(self) -> bool:
        """Whether the file is exactly the rows' answers."""
        return not (self.missing or self.doubled or self.foreign or self.torn or self.disordered or self.different)


class _ResultHead(msgspec.Struct):
    """The part of a result that the audit looks at."""

    id: int | str
    hash: str | None = None
    error: str | None = None


_HEAD = msgspec.json.Decoder(_ResultHead)


@dataclass
class _Answers:
    """Where the answer of every row lies. journal: index in `journals`, -1 for none; offset, size: of its line."""

    journals: list[Path]
    journal: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    profiles: list[str] = field(default_factory=list)


class _Merger:
    """Finds the answers of all rows."""

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._index: dict[str, int] = {}  # life: its number
        self._order: dict[int, list[int]] = {}  # shard: its lives, the last claimant first
        self._done: set[int] = set()  # shards that were done when their claims were followed
        rows = spool.total
        self.answers = _Answers([], np.full(rows, -1, np.int32), np.zeros(rows, np.int64), np.zeros(rows, np.int32))
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
        """The lives that had a shard, the last one that counts first. Raises EnvironmentFault for a gap in its names."""
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


def audit(spool: Spool, output: Path | None = None) -> Audit:
    """Check everything that the spool holds, row by row, and the merged file if there is one."""
    merger = _Merger(spool)
    merger.find()
    report = merger.audit
    checked = None if output is None or not output.exists() else _OutputCheck(output)
    lines = _answer_lines(spool, merger.answers)
    for shard in spool.shards:
        try:
            rows = spool.read(shard)
        except EnvironmentFault:
            report.changed_shards.append(shard.number)
            rows = []
        for number in range(shard.rows):
            line = next(lines)
            head = None if line is None else _HEAD.decode(line)
            if head is not None:
                report.failed += head.error is not None
                report.aside += head.error is not None and head.error.startswith("set aside: ")
                if rows and (head.id, head.hash) != (rows[number].name, rows[number].identity()):
                    report.foreign += 1
            if checked is not None and rows:
                checked.expect(rows[number].name, line)
    if checked is not None:
        report.output = checked.end()
    return report


class _OutputCheck:
    """Walks through a merged file beside the rows of the farm."""

    def __init__(self, path: Path) -> None:
        self._found = OutputAudit(file=str(path))
        self._lines: dict[str, list[bytes]] = {}
        self._in_order: list[str] = []
        self._at = 0
        with path.open("rb") as file:
            for line in file:
                self._read(line)

    def _read(self, line: bytes) -> None:
        try:
            head = _HEAD.decode(line) if line.endswith(b"\n") else None
        except (msgspec.DecodeError, UnicodeDecodeError):
            head = None
        if head is None:
            self._found.torn += 1
            return
        self._found.rows += 1
        self._lines.setdefault(str(head.id), []).append(hashlib.sha256(line.rstrip(b"\n")).digest())
        self._in_order.append(str(head.id))

    def expect(self, row_id: int | str | None, line: bytes | None) -> None:
        """The next row of the farm, and its answer if it has one."""
        name = str(row_id)
        lines = self._lines.pop(name, [])
        if not lines:
            self._found.missing += line is not None
            return
        self._found.doubled += len(lines) - 1
        self._found.different += line is None or lines[0] != hashlib.sha256(line).digest()
        self._found.disordered += self._at >= len(self._in_order) or self._in_order[self._at] != name
        self._at += 1

    def end(self) -> OutputAudit:
        """What was found."""
        self._found.foreign = sum(map(len, self._lines.values()))
        return self._found


def merge(spool: Spool, output: Path, partial: bool = False) -> Audit:
    """Write every answer to `output`, in the order of the input: whole or not at all.

    Raises PartialResults when rows are open and `partial` is not set, EnvironmentFault when the file cannot be
    written or the spool is damaged.
    """
    merger = _Merger(spool)
    merger.find()
    found = merger.audit
    if found.lost or found.foreign:
        raise EnvironmentFault(
            f"The farm is damaged: {found.lost:,} answers of completed shards are not there, {found.foreign:,} are "
            "of rows that it does not have.",
            "",
            f"`penstock farm merge {spool.folder} --check` says more.",
        )
    if found.open and not partial:
        raise PartialResults(
            f"{found.open:,} of {found.rows:,} rows are not answered yet.",
            "",
            f"`penstock farm resume {spool.folder}` goes on with them; --partial merges what is there.",
        )
    part = output.with_name(f".{output.name}-{secrets.token_hex(4)}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            for line in _answer_lines(spool, merger.answers):
                if line is not None:
                    file.write(line + b"\n")
                    head = _HEAD.decode(line)
                    found.failed += head.error is not None
                    found.aside += head.error is not None and head.error.startswith("set aside: ")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, output)
        sync_folder(output.parent)
    except OSError as error:
        raise EnvironmentFault(f"{output} cannot be written: {error.strerror}.", "", "Free some space.") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return found


def _answer_lines(spool: Spool, answers: _Answers) -> Iterator[bytes | None]:
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


_OPEN_FILES = 500


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
