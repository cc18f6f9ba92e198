"""Whether the life that holds a claim still lives. A wrong answer costs work done twice, never a wrong result."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from penstock.batch.farm.journal import Begin, End, Place, first_event, last_event
from penstock.batch.farm.manifest import Timing
from penstock.batch.farm.place import process_runs

RunningJobs = Callable[[], Collection[str] | None]  # names of my running jobs; None: Slurm does not answer
SILENT = 10  # leases: so long does Slurm's RUNNING count for a life that gives no sign
_ASK_SECONDS = 20.0  # between two questions to Slurm


def nobody_knows() -> None:
    """`RunningJobs` where there is no Slurm."""
    return None


@dataclass
class _Seen:
    """A heartbeat as it was first seen, in ns of the file server, and when, by our monotonic clock."""

    beat: int
    since: float


@dataclass(frozen=True)
class _Answer:
    """What Slurm said. names: of running jobs, empty where it does not know."""

    names: Collection[str]
    at: float


class _Queue:
    """Asks Slurm from a thread of its own, for a busy controller may take a minute and the engine must not wait."""

    def __init__(self, ask: RunningJobs) -> None:
        self._ask = ask
        self._answer: _Answer | None = None
        self._thread: threading.Thread | None = None

    def running(self) -> _Answer | None:
        """The latest answer, unless it is old; then another is on its way."""
        fresh = self._answer is not None and time.monotonic() - self._answer.at < _ASK_SECONDS
        if not fresh and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self._answer if fresh else None

    def _run(self) -> None:
        self._answer = _Answer(self._ask() or (), time.monotonic())


class Judge:
    """Watches the journals of others.

    A life is over when its journal says so, when its process is gone and this host can tell, or when it has given no
    sign for a lease. Signs are judged by two clocks, neither of them another node's: the file server's own (its time
    of our last heartbeat against its time of theirs), and our monotonic one, by which the journal must not have
    changed for two beats at least, while we watched. The second alone is enough after a whole lease, so that a file
    system that stamps files with its clients' clocks does no harm. A job that Slurm says is running gets ten leases,
    unless it runs again elsewhere.
    """

    def __init__(
        self, own: Place, timing: Timing, now: Callable[[], float], running: RunningJobs = nobody_knows
    ) -> None:
        """own: the place of the asking life; now: the file server's clock."""
        self._own, self._timing, self._now = own, timing, now
        self._queue = _Queue(running)
        self._seen: dict[str, _Seen] = {}
        self._restarts: dict[tuple[str, int], int] = {}

    def is_over(self, claim: Path) -> bool:
        """Whether the claim's holder will not go on with it. A claim that cannot be read is held."""
        try:
            fd = os.open(claim, os.O_RDONLY | os.O_CLOEXEC)  # opened anew, so that NFS asks the server
        except OSError:
            return False
        try:
            begin = first_event(fd)
            if isinstance(last_event(fd), End):
                return True
            return begin is None or self._is_gone(begin, os.fstat(fd).st_mtime_ns)
        finally:
            os.close(fd)

    def _is_gone(self, begin: Begin, beat: int) -> bool:
        place = begin.place
        if place.job is not None:
            key = (place.job, place.rank)
            self._restarts[key] = max(self._restarts.get(key, 0), place.restart)
        if place.host == self._own.host and not process_runs(place.process):
            return True
        if not self._is_silent(begin.life, beat, 1):
            return False
        return self._is_silent(begin.life, beat, SILENT) or not self._slurm_runs(place)

    def _is_silent(self, life: str, beat: int, leases: int) -> bool:
        moment = time.monotonic()
        seen = self._seen.get(life)
        if seen is None or seen.beat != beat:
            seen = self._seen[life] = _Seen(beat, moment)
        watched, lease = moment - seen.since, leases * self._timing.lease
        return watched >= lease or (watched >= 2 * self._timing.beat and self._now() - beat / 1e9 >= lease)

    def _slurm_runs(self, place: Place) -> bool:
        """Whether Slurm runs this very life: its job, and not a later start of it."""
        if place.job is None or place.restart < self._restarts.get((place.job, place.rank), 0):
            return False
        jobs = self._queue.running()
        return jobs is None or place.job in jobs.names
