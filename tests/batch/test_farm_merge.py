"""Which answer counts, and what the audit finds."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from penstock.batch.farm.audit import audit
from penstock.batch.farm.journal import Begin, Claim, JournalReader, JournalWriter, RowDone, bury, cut_torn_line
from penstock.batch.farm.ledger import Ledger
from penstock.batch.farm.merge import merge
from penstock.batch.farm.spool import Spool
from penstock.batch.farm.status import status_of
from penstock.batch.results import Result
from penstock.errors import EnvironmentFault, PartialResults
from tests.batch.farms import a_place, answer, live_here, make_farm


class Scribe:
    """A life that writes what the test tells it to."""

    def __init__(self, spool: Spool, name: str) -> None:
        self.spool, self.name = spool, name
        self.journal = JournalWriter(spool.journal(name), 0.0)
        self.journal.append([Begin(at=self.journal.now(), life=name, profile="", place=a_place())])

    def claim(self, shard: int, number: int) -> None:
        os.link(self.journal.path, self.spool.claim(shard, number))
        self.journal.append([Claim(at=self.journal.now(), shard=shard, number=number)])

    def answer(self, shard: int, *rows: int, mark: str = "") -> None:
        asked = self.spool.read(self.spool.shards[shard])
        for number in rows:
            result = answer(asked[number])
            self.write(shard, number, msgspec.structs.replace(result, text=f"{result.text}{mark}"))

    def write(self, shard: int, row: int, result: Result) -> None:
        raw = msgspec.Raw(msgspec.json.encode(result))
        now = self.journal.now()
        self.journal.append([RowDone(at=now, shard=shard, row=row, seconds=0.1, tokens=3, prompt_tokens=1, result=raw)])

    def done(self, shard: int) -> None:
        os.link(self.journal.path, self.spool.done(shard))


def texts(spool: Spool) -> list[str]:
    output = spool.folder / "output.jsonl"
    merge(spool, output)
    return [msgspec.json.decode(line)["text"] for line in output.read_bytes().splitlines()]


def test_the_answer_that_counts_does_not_depend_on_when_one_looks(tmp_path: Path) -> None:
    """A life thought gone goes on beside its successor, before and after the first merge."""
    spool = make_farm(tmp_path, 4, shard_rows=4)
    first, second = Scribe(spool, "first"), Scribe(spool, "second")
    first.claim(0, 0)
    first.answer(0, 0, 1, mark=" by first")
    second.claim(0, 1)
    second.answer(0, 2, 3, mark=" by second")
    second.done(0)
    expected = ["0 tpmorp by first", "1 tpmorp by first", "2 tpmorp by second", "3 tpmorp by second"]
    assert texts(spool) == expected
    first.answer(0, 2, 3, mark=" late")  # it answers what its successor has answered
    third = Scribe(spool, "third")
    third.claim(0, 2)  # it had looked before the shard was done
    third.answer(0, 0, 1, 2, 3, mark=" by third")
    assert texts(spool) == expected
    found, checked = audit(spool, spool.folder / "output.jsonl")
    assert found.sound
    assert checked is not None
    assert checked.sound
    assert found.repeated == 2  # those of the third are in no claim that counts
    status = status_of(Ledger(spool))
    assert (status.done, status.repeated) == (4, 6)


def test_what_is_open_is_said_and_can_be_merged_in_part(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 8, shard_rows=4)
    life = Scribe(spool, "life")
    life.claim(1, 0)
    life.answer(1, 0, 2)
    with pytest.raises(PartialResults, match="6 of 8 rows are not answered"):
        merge(spool, tmp_path / "o.jsonl")
    assert not (tmp_path / "o.jsonl").exists()
    assert merge(spool, tmp_path / "o.jsonl", partial=True).answered == 2
    assert [msgspec.json.decode(line)["id"] for line in (tmp_path / "o.jsonl").read_bytes().splitlines()] == [5, 7]


def test_a_torn_line_is_nobodys_answer(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 4, shard_rows=4)
    life = Scribe(spool, "life")
    life.claim(0, 0)
    life.answer(0, 0, 1)
    whole = spool.journal("life").read_bytes()
    for cut in (1, 40, len(whole.splitlines(keepends=True)[-1]) - 1):
        spool.journal("life").write_bytes(whole[:-cut])  # the links keep the inode: it is the same file
        assert status_of(Ledger(spool)).done == 1
        found, _ = audit(spool, tmp_path / "none")
        assert (found.answered, found.damaged) == (1, 0)
        assert found.torn_bytes > 0
    bury(spool.journal("life"), "killed", "SIGKILL")  # cuts it off before it writes its own line
    found, _ = audit(spool, tmp_path / "none")
    assert (found.answered, found.damaged, found.torn_bytes) == (1, 0, 0)
    assert live_here(spool, "next") == 0
    assert texts(spool) == ["0 tpmorp", "1 tpmorp", "2 tpmorp", "3 tpmorp"]


def test_a_reader_reads_on_and_leaves_torn_lines(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 4, shard_rows=4)
    life = Scribe(spool, "life")
    reader = JournalReader(spool.journal("life"))
    assert len(list(reader.read())) == 1
    life.answer(0, 0)
    with spool.journal("life").open("ab") as file:
        file.write(b'{"event":"row"')
    assert [type(event) for _, _, event in reader.read()] == [RowDone]
    assert list(reader.read()) == []
    assert reader.torn() == 14
    fd = os.open(spool.journal("life"), os.O_RDWR)
    cut_torn_line(fd)
    os.close(fd)
    assert reader.torn() == 0
    assert reader.damaged == 0


def test_the_audit_finds_what_must_not_be(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 8, shard_rows=4)
    assert live_here(spool) == 0
    output = spool.folder / "output.jsonl"
    merge(spool, output)
    lines = output.read_bytes().splitlines(keepends=True)

    def found(*changed: bytes) -> tuple[int, int, int, int, int, int]:
        output.write_bytes(b"".join(changed))
        _, checked = audit(spool, output)
        assert checked is not None
        assert checked.sound == (list(changed) == lines)
        return (
            checked.missing, checked.doubled, checked.foreign, checked.torn, checked.disordered, checked.different,
        )  # fmt: skip

    assert found(*lines) == (0, 0, 0, 0, 0, 0)
    assert found(*lines[:-1]) == (1, 0, 0, 0, 0, 0)
    assert found(*lines, lines[3])[1] == 1
    assert found(*lines, lines[0].replace(b'"id":1', b'"id":99'))[2] == 1
    assert found(*lines[:-1], lines[-1][:-9])[3] == 1
    assert found(lines[1], lines[0], *lines[2:])[4] == 2
    assert found(lines[0].replace(b"tpm", b"xxx"), *lines[1:])[5] == 1


def test_prompts_that_changed_and_answers_of_others_are_found(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 8, shard_rows=4)
    life = Scribe(spool, "life")
    for shard in (0, 1):
        life.claim(shard, 0)
        life.answer(shard, 0, 1, 2, 3)
    stranger = answer(spool.read(spool.shards[0])[0])
    other = Scribe(spool, "other")
    other.claim(1, 1)
    other.write(1, 2, stranger)  # a row's answer under another row's number
    found, _ = audit(spool, tmp_path / "none")
    assert not found.sound
    assert found.foreign == 1
    file = spool.folder / spool.manifest.rows
    file.write_bytes(file.read_bytes().replace(b"prompt 1", b"prompt 9"))
    found, _ = audit(spool, tmp_path / "none")
    assert found.changed_shards == [0]
    with pytest.raises(EnvironmentFault, match="not what it was"):
        spool.read(spool.shards[0])


def test_a_name_that_is_not_to_be_seen_yet_stops_the_merge(tmp_path: Path) -> None:
    """A file system may show the mark of a done shard before one of its claims: better to wait than to lose a row."""
    spool = make_farm(tmp_path, 4, shard_rows=4)
    assert live_here(spool) == 0
    hidden = spool.claim(0, 0).rename(tmp_path / "hidden")
    with pytest.raises(EnvironmentFault, match="in a minute"):
        merge(spool, tmp_path / "o.jsonl")
    hidden.rename(spool.claim(0, 0))
    assert merge(spool, tmp_path / "o.jsonl").answered == 4
