"""Rows out: a JSONL file that grows by whole lines and survives kill -9, full disks and reruns.

The file is the record of what is done. Lines are appended in the order of completion (the ids tell which is which).
Each carries its row's identity, so that a rerun knows what is done without asking by position, and notices a prompt
that has changed. Beside it lies `NAME.meta.json` (see record.py), which says what the rows belong to.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.batch.lines import LineFile, open_private, write_all
from penstock.batch.record import RunRecord, another_run, differences, read_record, record_path, write_record
from penstock.batch.rows import RowFile, RowId, key_number
from penstock.errors import EnvironmentFault, PartialResults, UsageError

if TYPE_CHECKING:
    import numpy as np


class Sample(msgspec.Struct, omit_defaults=True):
    """One of several texts of a row."""

    text: str | None
    token_ids: list[int]
    finish_reason: str


class Result(msgspec.Struct, omit_defaults=True):
    """One row of output. Token counts are tokens; `text` is None for a model without tokenizer.

    prompt: what the model continued, after template and chat template. samples: all texts of a row that asked for
    several; text, token_ids and finish_reason are then the first one's, and generated_tokens counts all. hash: the
    row's identity (`Row.identity`).
    """

    id: RowId
    prompt: str | None
    text: str | None
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    error: str | None = None
    samples: list[Sample] | None = None
    hash: str = ""


class Done(msgspec.Struct):
    """What a rerun needs to know of a line, of whatever kind: its row's identity, and whether it failed."""

    id: RowId
    hash: str
    failed: bool


class ResultWriter:
    """The output of one run. errors: bad rows, also of earlier runs; written: rows of this one.

    encode and done say what a line is; the defaults are those of `Result`.
    """

    def __init__(
        self,
        path: Path | None,
        record: RunRecord,
        *,
        overwrite: bool,
        retry_errors: bool,
        done: Callable[[bytes], Done | None] | None = None,
    ) -> None:
        """path: the file, or None for stdout. Raises UsageError when the file belongs to something else."""
        self.errors = self.written = 0
        self._before = array("Q")  # identities of the rows that are there already
        self._total = record.rows
        self._path, self._record, self._retry = path, record, retry_errors
        self._done = done or done_of_result
        self._file: LineFile | None = None
        self._fd = -1
        if path is None:
            self.name, self._fd = "stdout", os.dup(sys.stdout.fileno())
        elif not _may_be_regular(path):
            self.name, self._fd = str(path), open_private(path, os.O_WRONLY)
        else:
            self.name, self._file = str(path), LineFile(path)
            try:
                self._resume(self._file, path, overwrite)
            except BaseException:
                self._file.close()
                raise

    @property
    def done_before(self) -> int:
        """Rows that earlier runs did."""
        return len(self._before)

    def missing(self, keys: array[int], rows: Callable[[], Iterable[tuple[int, Any]]]) -> np.ndarray[Any, Any]:
        """Which rows of the input are still to do, a bool for each, in order.

        keys: the identities of all rows of the input (`InputSummary.keys`). rows: gives (line, row) of the input again,
        to name what is wrong. Raises UsageError when the output has a row that the input does not have, or not so.
        """
        import numpy as np  # the server, which imports this module, does without

        every = np.frombuffer(keys, dtype=np.uint64)
        before = np.frombuffer(self._before, dtype=np.uint64)
        todo = np.isin(every, before, invert=True)
        strangers = before[np.isin(before, every, invert=True)]
        if strangers.size:
            raise self._changed(set(strangers.tolist()), rows)
        return todo

    def write(self, results: list[Result]) -> None:
        """Append finished rows. Raises PartialResults when the disk takes no more; what was whole stays."""
        self.write_lines([_ENCODER.encode(r) + b"\n" for r in results], sum(r.error is not None for r in results))

    def write_lines(self, lines: list[bytes], errors: int) -> None:
        """The same for rows that are lines already; errors: how many of them failed."""
        if not lines:
            return
        try:
            if self._file is None:
                write_all(self._fd, b"".join(lines))
            else:
                self._file.append(lines)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            if self._file is not None:
                self.written = self._file.written
            raise self._stopped(error) from error
        self.written += len(lines)
        self.errors += errors

    def close(self) -> None:
        """Make everything durable. Raises PartialResults when the disk refuses."""
        if self._file is None:
            os.close(self._fd)
            return
        try:
            self._file.close()
        except OSError as error:
            raise self._stopped(error) from error

    def _stopped(self, error: OSError) -> PartialResults:
        done = self.done_before + self.written
        again = "run the same command again: it continues where this run stopped."
        return PartialResults(
            f"The output {self.name} cannot be written: {error.strerror}.",
            f"{done:,} of {self._total:,} rows are done and stay.",
            f"Free some space and {again if self._file else 'write to a file: only that can be continued.'}",
        )

    def _resume(self, file: LineFile, path: Path, overwrite: bool) -> None:
        """Find what earlier runs did, or start anew. Leaves the file ending with a whole line."""
        if file.size and not overwrite:
            earlier = read_record(path)
            if earlier is None:
                raise UsageError(
                    f"The output {path} exists, and it is not from `penstock generate`.",
                    f"{record_path(path).name} is not beside it, so nothing says what its rows belong to.",
                    "Give another output, or --overwrite to lose what it holds.",
                )
            changes = differences(earlier, self._record)
            if changes:
                raise another_run(path, changes)
            end, dropped = self._scan(file)
            try:
                if dropped:
                    file.replace(line for _, line, done in self._whole(file) if not done.failed)
                else:
                    file.trim(end)
            except OSError as error:
                raise self._stopped(error) from error
            if earlier.input_sha256 == self._record.input_sha256:
                return
        else:
            file.trim(0)
        write_record(path, self._record)

    def _scan(self, file: LineFile) -> tuple[int, bool]:
        """Take note of the rows that are there: (end of the last whole row, whether some must go)."""
        end, dropped = 0, False
        for start, line, done in self._whole(file):
            end = start + len(line)
            if done.failed and self._retry:
                dropped = True
                continue
            self._before.append(key_number(done.hash))
            self.errors += done.failed
        return end, dropped

    def _whole(self, file: LineFile) -> Iterator[tuple[int, bytes, Done]]:
        """(offset, line, what it says) of the rows that are there. Raises EnvironmentFault for damage."""
        torn = 0
        for number, (start, line) in enumerate(file.lines(), 1):
            done = self._done(line) if line.endswith(b"\n") else None
            if done is None:
                torn = torn or number
            elif torn:  # whole rows after a broken one: no crash does that
                raise EnvironmentFault(
                    f"The output {self.name} is damaged: line {torn} is not a row.",
                    "Something else has written to it.",
                    "Repair or delete that line, or use --overwrite to start again.",
                )
            else:
                yield start, line, done

    def _changed(self, strangers: set[int], rows: Callable[[], Iterable[tuple[int, Any]]]) -> UsageError:
        """The error that names the first row of the output that the input does not have."""
        if self._file is None or self._path is None:
            raise ValueError("only a file has rows from before")
        first = next(d.id for _, _, d in self._whole(self._file) if key_number(d.hash) in strangers)
        line = next((line for line, row in rows() if str(row.name) == str(first)), None)
        which = f"row {first!r} is gone" if line is None else f"row {first!r} (line {line}) asks for something else"
        more = f", and {len(strangers) - 1:,} more rows differ" if len(strangers) > 1 else ""
        return another_run(self._path, [f"the input ({which}{more})"])


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(Result)


def done_of_result(line: bytes) -> Done | None:
    """What a line of `Result` says; None for anything else."""
    try:
        result = _DECODER.decode(line)
        key_number(result.hash)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, ValueError):
        return None
    return Done(result.id, result.hash, result.error is not None)


def todo(rows: RowFile, missing: np.ndarray[Any, Any]) -> Iterator[Any]:
    """The rows of an input that are still to do."""
    return (row for row, wanted in zip(rows, missing, strict=False) if wanted)


def _may_be_regular(path: Path) -> bool:
    """Whether a path is a plain file or none yet, rather than a device or a pipe, which cannot be resumed."""
    try:
        return stat.S_ISREG(path.stat().st_mode) or path.is_dir()
    except OSError:  # not there, or not ours: opening it says which
        return True
