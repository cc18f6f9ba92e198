"""The parent of lives: starts them, says in the journal how a killed one died, starts the next one.

It imports nothing heavy and touches no model, so that a crash of the engine does not reach it. One supervisor has one
worker in a job of Slurm, or all workers of this machine in `penstock farm run`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from penstock.batch.farm.journal import JournalReader, RowDone, bury
from penstock.batch.farm.leaving import SIGNALS
from penstock.batch.farm.life import CRASHED, FULL, LEFT
from penstock.batch.farm.place import job_id
from penstock.batch.farm.spool import Spool

FRUITLESS = 5.0  # crashes in a row, each of a life that answered nothing, and the place is given up
_KILLED = 0.1  # what a life weighs in that sum that was killed from outside
_FINAL = (0, 1, 2, 3, 4, 5, LEFT, 130)  # exit codes after which a new life would change nothing
_FROM_OUTSIDE = (signal.SIGKILL, *SIGNALS, signal.SIGHUP)
_POLL = 0.1
_BACKOFF = 1.0  # seconds before the next life, times the sum


@dataclass(frozen=True)
class Place:
    """Where a worker runs. environment: added to ours; cores: their numbers, none for all that we have."""

    environment: Mapping[str, str]
    cores: tuple[int, ...]


@dataclass
class _Slot:
    """A place and the worker in it. not_before: when its next life may start, by time.monotonic()."""

    rank: int
    place: Place
    lives: int = 0
    fruitless: float = 0.0
    not_before: float = 0.0
    life: str = ""
    out_of_memory: int = 0  # kills for memory in our cgroup before this life
    process: subprocess.Popen[bytes] | None = None
    told: int | None = None  # the signal that its process got from us
    code: int | None = None  # of the place, when it is over


@dataclass
class Supervisor:
    """Keeps a life in every place until there is nothing to do. command: the argument list of a life, given its name,
    rank and place."""

    spool: Spool
    command: Callable[[str, int, Place], Sequence[str]]
    places: Sequence[Place]
    on_poll: Callable[[], None] = lambda: None
    first_rank: int = 0
    _slots: list[_Slot] = field(default_factory=list)
    _asked: int | None = None

    def run(self) -> int:
        """Returns the exit code: 0, or the first slot's that is not."""
        self._slots = [_Slot(self.first_rank + i, place) for i, place in enumerate(self.places)]
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._note) for number in SIGNALS if main}
        try:
            while any(slot.code is None for slot in self._slots):
                for slot in self._slots:
                    self._tend(slot)
                self.on_poll()
                time.sleep(_POLL)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._end_all()
        return next((slot.code for slot in self._slots if slot.code), 0)

    def _tend(self, slot: _Slot) -> None:
        if slot.code is not None:
            return
        if slot.process is None:
            if self._asked is not None:
                slot.code = LEFT if self._asked == signal.SIGUSR1 else 130
            elif time.monotonic() >= slot.not_before:
                self._start(slot)
            return
        if slot.told != self._asked and self._asked is not None:
            slot.told = self._asked
            slot.process.send_signal(self._asked)
        code = slot.process.poll()
        if code is None:
            return
        slot.process = None
        crashed = self._bury(slot, code)
        rows = sum(isinstance(event, RowDone) for _, _, event in JournalReader(self.spool.journal(slot.life)).read())
        slot.fruitless = 0.0 if rows else slot.fruitless + (1.0 if crashed else _KILLED)
        if code in _FINAL:
            slot.code = code
        elif slot.fruitless >= FRUITLESS:
            print("life after life ended without an answer: giving up", file=sys.stderr, flush=True)
            slot.code = 5 if code == FULL else 1 if code < 0 or code == CRASHED else code
        slot.not_before = time.monotonic() + _BACKOFF * slot.fruitless

    def _start(self, slot: _Slot) -> None:
        slot.lives, slot.told = slot.lives + 1, None
        slot.out_of_memory = _kills_for_memory()
        job = job_id() or f"{socket.gethostname()}-{os.getpid()}"
        restart = os.environ.get("SLURM_RESTART_COUNT", "0")
        slot.life = f"{job}.{restart}.{slot.rank}.{slot.lives}-{secrets.token_hex(3)}"
        slot.process = subprocess.Popen(
            [*self.command(slot.life, slot.rank, slot.place)],
            env={**os.environ, **slot.place.environment},
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C in a terminal comes through us, once
        )

    def _bury(self, slot: _Slot, code: int) -> bool:
        """Say in the journal how a life died that did not say so itself; returns whether it was its own fault."""
        if code in (*_FINAL, FULL, CRASHED):
            return code != 0
        number = max(0, -code)
        cause = signal.Signals(number).name if number in set(signal.Signals) else f"exit code {code}"
        if number == signal.SIGKILL and _kills_for_memory() > slot.out_of_memory:
            cause = "out of memory"
        crashed = number not in _FROM_OUTSIDE or cause == "out of memory"
        reason = "crashed" if crashed else "killed"
        print(f"life {slot.life} {reason}: {cause}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            bury(self.spool.journal(slot.life), reason, cause)
        return crashed

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self._asked == number:  # Ctrl-C again: somebody cannot wait
            for slot in self._slots:
                if slot.process is not None:
                    slot.process.kill()
        self._asked = number

    def _end_all(self) -> None:
        for slot in self._slots:
            if slot.process is not None and slot.process.poll() is None:
                slot.process.terminate()
                slot.process.wait()


def _kills_for_memory() -> int:
    """How many processes of our cgroup the kernel has killed for their memory; 0 where it does not say."""
    try:
        with open("/proc/self/cgroup") as file:
            group = next(line[3:].strip() for line in file if line.startswith("0::"))
        with open(f"/sys/fs/cgroup{group}/memory.events") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    except (OSError, StopIteration, ValueError):
        return 0
