"""A file that grows by whole lines and survives kill -9 and full disks: under every record of what has been done.

A line is appended by one write, so a crash leaves at most one torn line, at the end; `trim` cuts it off. A reader of a
file that is still growing must ignore it too (`whole_lines`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from penstock.errors import EnvironmentFault

SYNC_SECONDS = 5.0
SYNC_LINES = 256
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class LineFile:
    """One growing file, open in one process at a time, private (0600).

    written: lines that this object has appended and that are whole.
    """

    def __init__(self, path: Path) -> None:
        """Makes the file when it is not there. Raises EnvironmentFault: it cannot be opened, or another process has
        it."""
        self.path = path
        self._fd = open_private(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            self._lock()
        except BaseException:
            os.close(self._fd)
            raise
        self.written = 0
        self._unsynced, self._last_sync = 0, time.monotonic()

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._fd).st_size

    def append(self, lines: Sequence[bytes]) -> None:
        """Add lines, each with its end, by one write; every few seconds they are made durable.

        Raises OSError when the disk takes no more. What was whole by then stays; a torn line is cut off.
        """
        if not lines:
            return
        start = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            write_all(self._fd, b"".join(lines))
        except OSError:
            with contextlib.suppress(OSError):  # a rerun trims too
                self.written += self._trim_from(start)
            raise
        self.written += len(lines)
        self._unsynced += len(lines)
        if self._unsynced >= SYNC_LINES or time.monotonic() - self._last_sync >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Make what is written durable. Raises OSError."""
        os.fsync(self._fd)
        self._unsynced, self._last_sync = 0, time.monotonic()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of every line, the last one perhaps without its end."""
        return _lines(self._fd, 0)

    def trim(self, end: int) -> None:
        """Cut the file off at a byte."""
        os.ftruncate(self._fd, end)

    def close(self) -> None:
        """Make everything durable and let the file go. Raises OSError when the disk refuses."""
        try:
            self.sync()
        finally:
            os.close(self._fd)

    def replace(self, lines: Iterator[bytes]) -> None:
        """Put other lines in the place of all, at once: a crash leaves the old or the new ones. Raises OSError."""
        part = self.path.with_name(self.path.name + ".part")
        fd = open_private(part, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
        try:
            for line in lines:
                write_all(fd, line)
            os.fsync(fd)
            os.replace(part, self.path)
        except OSError:
            os.close(fd)
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        os.close(self._fd)
        self._fd = fd
        self._lock()

    def _trim_from(self, start: int) -> int:
        """Cut off a torn line behind byte `start`; how many whole ones are there."""
        end, count = start, 0
        for at, line in _lines(self._fd, start):
            if line.endswith(b"\n"):
                end, count = at + len(line), count + 1
        self.trim(end)
        return count

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system without locks loses only this check; two runs on one output are the user's mistake.
            if error.errno not in _NO_LOCKS:
                raise EnvironmentFault(
                    f"Another run is writing to {self.path}.", "", "Wait for it, or give another output."
                ) from None


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that may still be growing, a torn last one left out. Raises OSError."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def write_all(fd: int, data: bytes) -> None:
    """Write everything, in as many calls as the system wants. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def write_whole(path: Path, data: bytes) -> None:
    """Put a small file in place at once, private and durable. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(fd)
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make names that came or went durable. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_private(path: Path, flags: int) -> int:
    """Open an output, which only this user can read if it is made. Raises EnvironmentFault."""
    try:
        return os.open(path, flags | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EnvironmentFault(
            f"The output {path} cannot be opened: {error.strerror}.",
            "" if path.parent.is_dir() else f"The folder {path.parent} does not exist.",
        ) from None


def _lines(fd: int, start: int) -> Iterator[tuple[int, bytes]]:
    with open(os.dup(fd), "rb") as file:
        file.seek(start)
        for line in file:
            yield start, line
            start += len(line)
