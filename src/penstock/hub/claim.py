"""Who may write a file that several processes, perhaps on several nodes, want to fetch: a claim beside it.

A claim is a file made with O_EXCL, which holds on every file system, unlike flock. It is kept alive by its time of
change; whoever finds it old by the file server's own clock takes it over.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

STALE_SECONDS = 60.0
BEAT_SECONDS = 5.0
POLL_SECONDS = 0.3


class Claim:
    """A claim that is ours. `beat` must be called while the work goes on; it is cheap."""

    def __init__(self, path: Path) -> None:
        self._path, self._last = path, time.monotonic()

    def beat(self) -> None:
        """Say that we are alive, every few seconds at most."""
        now = time.monotonic()
        if now - self._last > BEAT_SECONDS:
            self._last = now
            with contextlib.suppress(OSError):
                os.utime(self._path)


@contextlib.contextmanager
def claimed(path: Path, done: Callable[[], bool], wait: Callable[[], None] = lambda: None) -> Iterator[Claim | None]:
    """Hold the claim `path`, or None as soon as `done` says that another process has finished the work.

    wait: called while another process has it. Raises OSError when the folder cannot be written.
    """
    while not done():
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            if not _take_away(path):
                wait()
                time.sleep(POLL_SECONDS)
            continue
        with os.fdopen(handle, "w") as file:
            file.write(_self())
        try:
            yield None if done() else Claim(path)
        finally:
            path.unlink(missing_ok=True)
        return
    yield None


def _self() -> str:
    return f"{socket.gethostname()} {os.getpid()}"


def _take_away(path: Path) -> bool:
    """Remove a claim whose process is gone. Returns whether the way may be free now."""
    try:
        before = path.stat()
        host, _, pid = path.read_text().partition(" ")
    except FileNotFoundError:
        return True
    except OSError:
        return False
    dead = host == socket.gethostname() and pid.isdecimal() and not _lives(int(pid))
    if not dead and _server_time(path.parent) - before.st_mtime < STALE_SECONDS:
        return False
    aside = path.with_name(f"{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        path.rename(aside)
    except FileNotFoundError:
        return True
    if aside.stat().st_ino != before.st_ino:  # somebody was faster and has a new claim: give it back
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)
    return True


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _server_time(folder: Path) -> float:
    """Now, by the clock that gives files of this folder their times."""
    probe = folder / f".clock.{os.getpid()}.{time.monotonic_ns()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)
