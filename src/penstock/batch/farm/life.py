"""One life from its first line to its last: journal and heartbeat, the model, the work, the reason for its end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec

from penstock.batch.farm.claims import Claims
from penstock.batch.farm.journal import Begin, End, JournalWriter, Loaded, Place
from penstock.batch.farm.lease import Judge, RunningJobs
from penstock.batch.farm.leaving import Leaving
from penstock.batch.farm.manifest import Manifest, ModelCopy, Profile
from penstock.batch.farm.prepare import check_model
from penstock.batch.farm.spool import Spool
from penstock.batch.farm.worker import Generate, Worker
from penstock.errors import EnvironmentFault, PenstockError

HUNG = 900.0  # seconds that one step may take before the life no longer gives signs
FULL = 75  # exit code: the disk was full for too long, or the journal may not grow; a new life may find room
LEFT = 6  # exit code: there was work left, and somebody else may go on with it
CRASHED = 70  # exit code: the engine raised, and the journal says so
_DETAIL = 500  # characters of an error that go into the journal
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Engine:
    """What makes a life's engine. load: from model and profile to the function that generates. staged: a copy of the
    model on this node, if there is one; staging_seconds: what that took before this life."""

    load: Callable[[Manifest, ModelCopy, Profile], Generate]
    staged: Path | None = None
    staging_seconds: float = 0.0


def live(spool: Spool, life: str, place: Place, engine: Engine, running: RunningJobs, deadline: float | None) -> int:
    """Be the life `life`; returns the exit code of its process.

    0: nothing is left to do for it. LEFT: it was asked to leave, or its time is over, with work left. CRASHED, FULL: a
    new life may do better. Others: the error.
    """
    manifest = spool.manifest
    try:
        journal = JournalWriter(spool.journal(life), manifest.timing.patience)
    except OSError as error:
        print(f"{spool.journal(life)}: {error.strerror}", file=sys.stderr, flush=True)
        return FULL
    leaving = Leaving(spool.cancelled, deadline, manifest.timing.grace)
    try:
        with leaving, _Heart(journal, manifest.timing.beat) as heart:
            try:
                journal.append([Begin(at=journal.now(), life=life, profile=place.partition, place=place)])
                reason, rows = _work(spool, life, place, engine, running, journal, heart, leaving)
                code, detail = _exit_code(reason, rows, leaving.signal), ""
            except OSError as error:
                print(f"{spool.folder}: {error}", file=sys.stderr, flush=True)
                reason, detail, code = "full", str(error.strerror)[:_DETAIL], FULL
            except PenstockError as error:
                print(error, file=sys.stderr, flush=True)
                reason, detail, code = "failed", str(error)[:_DETAIL], error.exit_code
            except _EngineFailed as failure:
                traceback.print_exception(failure.error)
                reason, detail, code = "crashed", str(failure)[:_DETAIL], CRASHED
            with contextlib.suppress(OSError):
                journal.append([End(at=journal.now(), reason=reason, detail=detail)], keep_on=lambda: False)
                journal.sync()
    finally:
        journal.close()
    return code


def _work(
    spool: Spool,
    life: str,
    place: Place,
    engine: Engine,
    running: RunningJobs,
    journal: JournalWriter,
    heart: _Heart,
    leaving: Leaving,
) -> tuple[str, int]:
    """Bring the model up and work: (why it ended, rows answered)."""
    journal.sync()

    def leave() -> None:
        """A model that is being loaded cannot be waited for, and holds nothing."""
        journal.append([End(at=journal.now(), reason="asked")], keep_on=lambda: False)
        os._exit(_exit_code("asked", 0, leaving.signal))

    leaving.hurry = leave
    begun = time.monotonic()
    model = spool.manifest.model(place.partition)
    if engine.staged is not None:
        model = msgspec.structs.replace(model, path=str(engine.staged))
    check_model(model)
    generate = engine.load(spool.manifest, model, spool.manifest.profile(place.partition))
    leaving.hurry = None
    loaded = Loaded(at=journal.now(), staging=engine.staging_seconds, loading=time.monotonic() - begun)
    journal.append([loaded], keep_on=lambda: not leaving)
    judge = Judge(place, spool.manifest.timing, journal.now, running)
    worker = Worker(spool, Claims(spool, journal, judge, life), journal, generate, leaving, heart.step)
    try:
        return worker.run(), worker.rows
    except (OSError, EnvironmentFault):
        raise
    except Exception as error:
        raise _EngineFailed(error) from error


class _EngineFailed(Exception):
    """The engine raised: its rows are as suspect as if the process had crashed."""

    def __init__(self, error: Exception) -> None:
        super().__init__(f"{type(error).__name__}: {error}")
        self.error = error


def _exit_code(reason: str, rows: int, number: int | None) -> int:
    """A worker that was told to go by TERM is not started again by its own job, nor is one whose job is too short."""
    if reason == "asked":
        return LEFT if number == signal.SIGUSR1 else 130
    if reason == "time":
        return LEFT if rows else 1
    return 0


class _Heart:
    """Beats for a life, from a thread of its own, unless the engine has hung."""

    def __init__(self, journal: JournalWriter, seconds: float) -> None:
        self._journal, self._seconds = journal, seconds
        self._stopped = threading.Event()
        self._last: float | None = None  # None while the model is loaded, which may take any time
        self._thread = threading.Thread(target=self._run, daemon=True)

    def step(self) -> None:
        """The work goes on."""
        self._last = time.monotonic()

    def __enter__(self) -> _Heart:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            if self._last is None or time.monotonic() - self._last < HUNG:
                with contextlib.suppress(OSError):
                    self._journal.beat()


def follow_parent() -> None:
    """Be asked to leave when the supervisor dies; leave no core file with prompts in it."""
    parent = os.getppid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)
