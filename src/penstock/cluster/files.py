"""Private files on a shared file system: written whole, dated by the file server's clock, errors for people."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from penstock.errors import EnvironmentFault, PenstockError, ResourceError

PRIVATE_DIRECTORY, PRIVATE_FILE = 0o700, 0o600


def write_private(file: Path, text: str) -> None:
    """Put a file in place, readable by this user alone: others see the old one or the new one. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")  # mode 600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.rename(name, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def create_private(file: Path, text: str) -> None:
    """Make a file that must not exist yet, readable by this user alone. Raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(file, flags, PRIVATE_FILE), "w", encoding="utf-8") as stream:
        os.fchmod(stream.fileno(), PRIVATE_FILE)  # whatever the umask
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def private_directory(path: Path) -> None:
    """Make a directory that only this user enters, and its parents; refuse one that is somebody else's.

    Raises EnvironmentFault, ResourceError.
    """
    try:
        path.mkdir(mode=PRIVATE_DIRECTORY, parents=True, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise EnvironmentFault(f"{path} is not a directory of yours.", hint="Name another with PENSTOCK_JOBS_DIR.")
        if found.st_mode & 0o077:
            path.chmod(PRIVATE_DIRECTORY)
    except OSError as error:
        raise cannot_write(path, error) from error


def server_time(directory: Path) -> float:
    """Now, by the clock that dates the files of a directory. Raises OSError."""
    descriptor, name = tempfile.mkstemp(dir=directory, prefix=".clock.")
    try:
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)
        os.unlink(name)


def cannot_write(path: Path, error: OSError) -> PenstockError:
    """The error for a file or directory that could not be made."""
    if error.errno in (errno.EDQUOT, errno.ENOSPC):
        full = "Your quota is full" if error.errno == errno.EDQUOT else "The file system is full"
        return ResourceError(
            f"{path} cannot be written: {os.strerror(error.errno)}.",
            f"{full}; a server needs a few hundred KiB there for its script, its key and its log.",
            "Free some space, or set PENSTOCK_JOBS_DIR to a directory on another shared file system.",
        )
    return EnvironmentFault(
        f"{path} cannot be written: {error.strerror}.",
        hint="Set PENSTOCK_JOBS_DIR to a directory of yours that every node sees.",
    )
