"""Rows out: a JSONL file that grows by whole lines and survives kill -9, full disks and reruns.

The file is the record of what is done. Lines are appended in the order of completion (the ids tell which is which),
each by one write; a reader of a file that is still growing may see a torn last line, and so does a rerun, which cuts
it off. Beside it lies `NAME.meta.json` (see record.py), which says what the rows belong to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from penstock.batch.record import RunRecord, check_same, read_record, record_path, write_record
from penstock.errors import EnvironmentFault, PartialResults, UsageError

SYNC_SECONDS = 5.0
SYNC_ROWS = 256
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class Result(msgspec.Struct, omit_defaults=True):
    """One row of output. Token counts are tokens; `text` is None for a model without tokenizer."""

    id: int | str
    prompt: str | None
    text: str | None
    token_ids: list[int]
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    error: str | None = None


_DECODER = msgspec.json.Decoder(Result)


class ResultWriter:
    """The output of one run. `done` are the ids (as strings) that are there already; `errors` counts bad rows."""

    def __init__(self, path: Path | None, record: RunRecord, *, overwrite: bool, retry_errors: bool) -> None:
        """path: the file, or None for stdout. Raises UsageError when the file belongs to something else."""
        self.done: set[str] = set()
        self.errors = 0
        self.written = 0  # rows of this run
        self._total = record.rows
        self._encoder = msgspec.json.Encoder()
        self._path = path
        self._durable = path is not None and _may_be_regular(path)
        self._unsynced, self._last_sync = 0, time.monotonic()
        if path is None:
            self.name, self._fd = "stdout", os.dup(sys.stdout.fileno())
            return
        self.name = str(path)
        self._fd = open_locked(path, self._durable)
        if self._durable:
            try:
                self._resume(path, record, overwrite, retry_errors)
            except BaseException:
                os.close(self._fd)
                raise

    def write(self, results: list[Result]) -> None:
        """Append finished rows. Raises PartialResults when the disk takes no more; what was whole stays."""
        if not results:
            return
        start = os.lseek(self._fd, 0, os.SEEK_END) if self._durable else 0
        try:
            write_all(self._fd, b"".join(self._encoder.encode(result) + b"\n" for result in results))
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise
            self._give_back(start)
            raise self._stopped(error) from error
        self.written += len(results)
        self.errors += sum(result.error is not None for result in results)
        self._unsynced += len(results)
        if self._unsynced >= SYNC_ROWS or time.monotonic() - self._last_sync >= SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        """Make everything durable. Raises PartialResults when the disk refuses."""
        try:
            self._sync()
        finally:
            os.close(self._fd)

    def _sync(self) -> None:
        try:
            if self._durable:
                os.fsync(self._fd)
        except OSError as error:
            raise self._stopped(error) from error
        self._unsynced, self._last_sync = 0, time.monotonic()

    def _give_back(self, start: int) -> None:
        """Cut off what a failed write left of its lines; the rows come again in the next run."""
        if self._durable:
            with contextlib.suppress(OSError):  # a rerun cuts torn lines too
                whole = _whole_lines(self._fd, start)
                os.ftruncate(self._fd, whole.end)
                self.written += whole.lines

    def _stopped(self, error: OSError) -> PartialResults:
        done = len(self.done) + self.written
        again = "run the same command again: it continues where this run stopped."
        return PartialResults(
            f"The output {self.name} cannot be written: {error.strerror}.",
            f"{done:,} of {self._total:,} rows are done and stay.",
            f"Free some space and {again if self._durable else 'write to a file: only that can be continued.'}",
        )

    def _resume(self, path: Path, record: RunRecord, overwrite: bool, retry_errors: bool) -> None:
        """Find what earlier runs did, or start anew. Leaves the file ending with a whole line."""
        size = os.fstat(self._fd).st_size
        if size and not overwrite:
            earlier = read_record(path)
            if earlier is None:
                raise UsageError(
                    f"The output {path} exists, and it is not from `penstock generate`.",
                    f"{record_path(path).name} is not beside it, so nothing says what its rows belong to.",
                    "Give another output, or --overwrite to lose what it holds.",
                )
            check_same(path, earlier, record)
            end, dropped = self._scan(retry_errors)
            if dropped:
                self._rewrite(path, end, retry_errors)
            else:
                os.ftruncate(self._fd, end)
            return
        os.ftruncate(self._fd, 0)
        write_record(path, record)

    def _scan(self, retry_errors: bool) -> tuple[int, bool]:
        """Take note of the rows that are there: (end of the last whole row, whether some must go)."""
        dropped, end, torn = False, 0, 0
        for number, (start, line) in enumerate(lines_of(self._fd), 1):
            result = _parse(line)
            if result is None:
                torn = torn or number
                continue
            if torn:  # whole rows after a broken one: no crash does that
                raise EnvironmentFault(
                    f"The output {self.name} is damaged: line {torn} is not a row.",
                    "Something else has written to it.",
                    "Repair or delete that line, or use --overwrite to start again.",
                )
            end = start + len(line)
            if retry_errors and result.error is not None:
                dropped = True
                continue
            self.done.add(str(result.id))
            self.errors += result.error is not None
        return end, dropped

    def _rewrite(self, path: Path, end: int, retry_errors: bool) -> None:
        """Replace the file by one without the rows to retry, at once: a crash leaves the old or the new one."""
        part = path.with_name(path.name + ".part")
        fd = open_locked(part, durable=True)
        try:
            os.ftruncate(fd, 0)
            for start, line in lines_of(self._fd):
                result = _parse(line) if start < end else None
                if result is not None and not (retry_errors and result.error is not None):
                    write_all(fd, line)
            os.fsync(fd)
            os.replace(part, path)
        except OSError as error:
            os.close(fd)
            with contextlib.suppress(OSError):
                part.unlink()
            raise self._stopped(error) from error
        os.close(self._fd)
        self._fd = fd


def _may_be_regular(path: Path) -> bool:
    """Whether a path is a plain file or none yet, rather than a device or a pipe, which cannot be resumed."""
    try:
        return stat.S_ISREG(path.stat().st_mode) or path.is_dir()
    except OSError:  # not there, or not ours: opening it says which
        return True


def _parse(line: bytes) -> Result | None:
    """The row of a whole line, None for anything else."""
    try:
        return _DECODER.decode(line) if line.endswith(b"\n") else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def write_all(fd: int, data: bytes) -> None:
    """Write every byte. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


class _Whole(msgspec.Struct, frozen=True):
    end: int  # byte after the last whole line
    lines: int


def _whole_lines(fd: int, start: int) -> _Whole:
    """The whole lines of a file from byte `start` on."""
    end, lines = start, 0
    for at, line in lines_of(fd, start):
        if line.endswith(b"\n"):
            end, lines = at + len(line), lines + 1
    return _Whole(end, lines)


def lines_of(fd: int, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of every line of a file, the last one perhaps without its end."""
    with open(os.dup(fd), "rb") as file:
        file.seek(start)
        for line in file:
            yield start, line
            start += len(line)


def open_locked(path: Path, durable: bool) -> int:
    """Open for appending, private (0600) and locked against a second run; makes the file when it is not there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND if durable else os.O_WRONLY
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EnvironmentFault(
            f"The output {path} cannot be opened: {error.strerror}.",
            "" if path.parent.is_dir() else f"The folder {path.parent} does not exist.",
        ) from None
    if durable:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system without locks loses only this check; two runs on one output are the user's mistake.
            if error.errno not in _NO_LOCKS:
                os.close(fd)
                raise EnvironmentFault(
                    f"Another run is writing to {path}.", "", "Wait for it, or give another output."
                ) from None
    return fd
