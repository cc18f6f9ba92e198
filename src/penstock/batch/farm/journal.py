"""The journal: one append-only file for each life of a worker, and the only file that this life writes.

A life is one process from its start to its end. Its journal says what it is, what it claimed, started and finished,
and how it ended, as one JSON object a line. A claim and a done marker are hard links to the journal (claims.py), so
whoever has a shard's name has its rows, and its holder's heartbeat (the file's time of modification), without
listing a folder.

What counts is whole lines. A process that is killed leaves at most a torn last line, which readers do not see.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_RETRY = 0.5  # seconds between two tries to write on a full disk
TAIL = 16384  # bytes at the end of a journal in which its last line is looked for


class Event(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True, tag_field="event"):
    """at: seconds since 1970 by the file server's clock, which is the same for all nodes."""

    at: float


class Place(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Where a life is. job: what squeue calls it, None outside Slurm; host and process tell whether it still runs."""

    node: str
    host: str  # boot id and PID namespace: processes that can see each other
    process: str  # process id and its start time
    partition: str = ""
    job: str | None = None
    restart: int = 0
    rank: int = 0
    cpus: int = 1
    gpus: int = 0


class Begin(Event, frozen=True, omit_defaults=True, kw_only=True, tag_field="event", tag="begin"):
    """The first line. submitted: when the job was submitted or requeued, by Slurm, if known."""

    life: str
    profile: str
    place: Place


class Loaded(Event, frozen=True, omit_defaults=True, kw_only=True, tag_field="event", tag="loaded"):
    """The model is in memory. staging, loading: seconds."""

    staging: float
    loading: float


class Claim(Event, frozen=True, omit_defaults=True, kw_only=True, tag_field="event", tag="claim"):
    """The shard is this life's; number: how many lives had it before."""

    shard: int
    number: int


class Start(Event, frozen=True, omit_defaults=True, kw_only=True, tag_field="event", tag="start"):
    """These rows of a shard go into the engine. alone: nothing else is in it."""

    shard: int
    rows: list[int]
    alone: bool = False


class RowDone(Event, frozen=True, omit_defaults=True, kw_only=True, tag_field="event", tag="row"):
    """The result of one row. row: its place in the shard; seconds: in the engine; aside: it was not run again."""

    shard: int
    row: int
    seconds: float
    tokens: int
    prompt_tokens: int
    failed: bool = False
    aside: bool = False
    result: msgspec.Raw


class Done(Event, frozen=True, omit_defaults=True, kw_only=True, tag_field="event", tag="done"):
    """All rows of the shard are on disk."""

    shard: int


class End(Event, frozen=True, omit_defaults=True, kw_only=True, tag_field="event", tag="end"):
    """The last line. Whatever the life had claimed and not done is free.

    reason: finished, idle, asked (a signal), time (the job's time is over), full (the disk), failed (it said why),
    and, written by its supervisor, crashed or killed.
    """

    reason: str
    detail: str = ""


AnyEvent = Begin | Loaded | Claim | Start | RowDone | Done | End
_DECODER: msgspec.json.Decoder[AnyEvent] = msgspec.json.Decoder(AnyEvent)
_ENCODER = msgspec.json.Encoder()


class JournalWriter:
    """The journal of this process's own life. `append` and `commit` are for one thread, `beat` for any."""

    def __init__(self, path: Path, patience: float) -> None:
        """Make the file; one that is there belongs to another life. patience: seconds to wait for a full disk.

        Raises OSError.
        """
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.path, self._patience = path, patience
        self.inode = os.fstat(self._fd).st_ino
        self._ahead = 0.0  # the file server's clock less ours, which is monotonic
        self._lock = threading.Lock()
        self._end = 0
        self.beat()

    def beat(self) -> None:
        """Say that this life goes on, and read the file server's clock."""
        with self._lock:
            if self._fd >= 0:
                os.utime(self._fd)
                self._ahead = os.fstat(self._fd).st_mtime - time.monotonic()

    def now(self) -> float:
        """The file server's clock."""
        return self._ahead + time.monotonic()

    def append(self, events: list[AnyEvent], keep_on: Callable[[], bool] = lambda: True) -> None:
        """Write whole lines at the end. A full disk is waited for while `keep_on()`, at most `patience` seconds.

        Raises OSError when it cannot be written; what had been written of whole lines stays.
        """
        rest = memoryview(b"".join(_ENCODER.encode(event) + b"\n" for event in events))
        until = time.monotonic() + self._patience
        while rest:
            try:
                count = os.pwrite(self._fd, rest, self._end)
            except OSError as error:
                if error.errno not in DISK_IS_FULL or time.monotonic() > until or not keep_on():
                    self._cut_torn_line()
                    raise
                time.sleep(_RETRY)
                continue
            self._end += count
            rest = rest[count:]

    def sync(self) -> None:
        """Have what was appended on the server's disk. Raises OSError."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            os.close(self._fd)
            self._fd = -1

    def _cut_torn_line(self) -> None:
        with contextlib.suppress(OSError):
            self._end = cut_torn_line(self._fd)


def cut_torn_line(fd: int) -> int:
    """Cut a file after its last whole line; returns its new size in bytes."""
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        start = max(0, end - TAIL)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)
    return end


def bury(path: Path, reason: str, detail: str) -> None:
    """Write the last line of a life that did not write it itself and whose process is gone for certain."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        end = cut_torn_line(fd)
        if isinstance(last_event(fd), End):
            return
        os.utime(fd)
        event = End(at=os.fstat(fd).st_mtime, reason=reason, detail=detail)
        os.pwrite(fd, _ENCODER.encode(event) + b"\n", end)
        os.fsync(fd)
    finally:
        os.close(fd)


def make_durable(path: Path) -> None:
    """Have another's journal on disk as far as it can be seen now. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def first_event(fd: int) -> Begin | None:
    """The first line of an open journal."""
    line, newline, _ = os.pread(fd, TAIL, 0).partition(b"\n")
    event = decode(line) if newline else None
    return event if isinstance(event, Begin) else None


def last_event(fd: int) -> AnyEvent | None:
    """The last whole line of an open journal, unless it is longer than an `End` can be."""
    size = os.fstat(fd).st_size
    lines = os.pread(fd, TAIL, max(0, size - TAIL)).split(b"\n")
    return decode(lines[-2]) if len(lines) > 1 else None


def decode(line: bytes) -> AnyEvent | None:
    """The event of a line without its end; None for what is none."""
    try:
        return _DECODER.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class JournalReader:
    """Another life's journal, read on from where the last reading stopped. `damaged`: lines that are no event."""

    def __init__(self, path: Path) -> None:
        """path: the journal, or a link to it."""
        self.path = path
        self.damaged = 0
        self._offset = 0

    def read(self) -> Iterator[tuple[int, int, AnyEvent]]:
        """(offset, length, event) of every whole line that is new; nothing when the file cannot be read."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                start = self._offset
                self._offset += len(line)
                event = decode(line)
                if event is None:
                    self.damaged += 1
                else:
                    yield start, len(line), event

    def torn(self) -> int:
        """Bytes behind the last whole line."""
        try:
            return max(0, os.stat(self.path).st_size - self._offset)
        except OSError:
            return 0
