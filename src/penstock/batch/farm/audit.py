"""The audit of a farm: every row, every answer, every line of the merged file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from penstock.batch.farm.answers import RESULT_HEAD, Audit, Finder, answer_lines
from penstock.batch.farm.spool import Spool
from penstock.errors import EnvironmentFault


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


def audit(spool: Spool, output: Path) -> tuple[Audit, OutputAudit | None]:
    """Check everything that the spool holds, row by row, and the merged file if it is there."""
    finder = Finder(spool)
    finder.find()
    report = finder.audit
    checked = _OutputCheck(output) if output.exists() else None
    lines = answer_lines(spool, finder.answers)
    for shard in spool.shards:
        try:
            rows = spool.read(shard)
        except EnvironmentFault:
            report.changed_shards.append(shard.number)
            rows = []
        for number in range(shard.rows):
            line = next(lines)
            head = None if line is None else RESULT_HEAD.decode(line)
            if head is not None:
                report.failed += head.error is not None
                report.aside += head.aside
                if rows and (head.id, head.hash) != (rows[number].name, rows[number].identity()):
                    report.foreign += 1
            if checked is not None and rows:
                checked.expect(rows[number].name, line)
    return report, None if checked is None else checked.end()


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
            head = RESULT_HEAD.decode(line) if line.endswith(b"\n") else None
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
