"""Staged models on one node: a private directory on its RAM disk or local disk, used by this user's jobs together.

    PLACE/penstock-UID/KEY/          a whole, checked model
                       KEY.part/     one that is being copied, under the lock KEY.lock
                       KEY.jobs/ID   one empty file for each job that uses it

The lock is flock: the directory is local to the node, where that holds.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_KEY = re.compile(r"[0-9a-f]{24}")


class Store:
    """The staged models of this user in one place of this node."""

    def __init__(self, place: Path) -> None:
        self.path = place / f"penstock-{os.getuid()}"
        self._locks: dict[str, int] = {}

    def open(self) -> None:
        """Make the directory, or refuse one that others could have made or can enter. Raises OSError."""
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            raise PermissionError(1, "it is not a private directory of this user", str(self.path))

    def whole(self, key: str) -> Path | None:
        """The staged model, if it is there and ours."""
        try:
            self._check_ours()
        except OSError:
            return None
        return self.path / key if (self.path / key).is_dir() else None

    def part(self, key: str) -> Path:
        """Where a model is copied to before it is whole."""
        return self.path / f"{key}.part"

    def lock(self, key: str) -> bool:
        """Take the right to copy a model here; False while another process has it. Raises OSError."""
        if key in self._locks:
            return True
        descriptor = os.open(self.path / f"{key}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._locks[key] = descriptor
        return True

    def unlock(self, key: str) -> None:
        """Let others copy it."""
        if key in self._locks:
            os.close(self._locks.pop(key))

    def commit(self, key: str) -> Path:
        """The copied model becomes the staged one. Raises OSError."""
        shutil.rmtree(self.path / key, ignore_errors=True)
        os.rename(self.part(key), self.path / key)
        return self.path / key

    def use(self, key: str, job: str) -> None:
        """Note that a job uses a model. Raises OSError."""
        marks = self.path / f"{key}.jobs"
        marks.mkdir(mode=0o700, exist_ok=True)
        (marks / job).touch(mode=0o600)

    def release(self, key: str, job: str, living: Iterable[str] | None) -> bool:
        """A job needs the model no more; the last one removes it. living: jobs that still run, None if unknown.

        Returns whether it was removed.
        """
        marks = self.path / f"{key}.jobs"
        with suppress(OSError):
            (marks / job).unlink()
        try:
            users = set(os.listdir(marks))
        except OSError:
            users = set()
        if living is not None:
            users &= set(living)
        if users:
            return False
        there = (self.path / key).exists() or self.part(key).exists()
        for leftover in (self.path / key, self.part(key), marks):
            shutil.rmtree(leftover, ignore_errors=True)
        with suppress(OSError):
            (self.path / f"{key}.lock").unlink()
            self.path.rmdir()  # only when nothing else is in it
        return there

    def keys(self) -> list[str]:
        """The models that are here, whole or not."""
        try:
            self._check_ours()
            names = os.listdir(self.path)
        except OSError:
            return []
        return sorted({name.partition(".")[0] for name in names if _KEY.fullmatch(name.partition(".")[0])})

    def _check_ours(self) -> None:
        found = self.path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise PermissionError(1, "it is not a directory of this user", str(self.path))


def release(staged: Path, living: Iterable[str] | None) -> None:
    """This job needs a staged model on this node no more: see Store.release."""
    store = Store(staged.parent.parent)
    if store.path == staged.parent and _KEY.fullmatch(staged.name):
        store.release(staged.name, os.environ.get("SLURM_JOB_ID", "0"), living)
