"""Other processes on our cores, and how many threads are worth using beside them.

A parallel region ends when its last thread does, so one thread that a neighbour keeps off its core for a scheduling
quantum holds up all others, in every region. Fewer threads are faster then: each has a core of its own.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

_STAT = Path("/proc/stat")
_SECONDS = 0.25  # between two looks; shorter ones would be coarse in the kernel's ticks of 10 ms
_WORKING = 0.5  # of a core: less, on the average since the last look, and we were idle for a while
_TOLERATED = 0.35  # of a core: of a fair share of 0.5 that a busy neighbour takes, and above what small ones do


class Crowd:
    """Watches the cores that this process may use. Without /proc it sees nobody."""

    def __init__(self, threads: int) -> None:
        """threads: to be used when nobody else is here; fewer than all cores leave room for others anyway."""
        self._threads = self._used = threads
        self._cpus = _our_cpus()
        self._watches = threads > 1 and threads >= len(self._cpus) > 0
        self._since = time.monotonic()
        self._busy, self._own = self._usage() if self._watches else (0.0, 0.0)

    def adjust(self, set_threads: Callable[[int], None]) -> None:
        """Now and then, call `set_threads` with the number of threads to use from here on. Cheap to call often."""
        now = time.monotonic()
        if not self._watches or now - self._since < _SECONDS:
            return
        busy, own = self._usage()
        ours, all_of_it, seconds = own - self._own, busy - self._busy, now - self._since
        self._since, self._busy, self._own = now, busy, own
        # who was busy while we were idle says nothing of now
        others = (all_of_it - ours) / seconds if ours > _WORKING * seconds else 0.0
        use = max(1, self._threads - math.ceil(max(0.0, others - _TOLERATED)))
        if use != self._used:
            self._used = use
            set_threads(use)

    def _usage(self) -> tuple[float, float]:
        """Seconds that our cores have computed for anybody, and for this process."""
        ticks = 0
        try:
            for line in _STAT.read_text().splitlines():
                if not line.startswith("cpu"):
                    break
                name, user, nice, system, _idle, _iowait, irq, softirq = line.split()[:8]
                if name != "cpu" and int(name[3:]) in self._cpus:
                    ticks += int(user) + int(nice) + int(system) + int(irq) + int(softirq)
        except (OSError, ValueError):
            self._watches = False
        return ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


def _our_cpus() -> set[int]:
    """The processors that threads of this process may run on. Each thread that OpenMP has bound has one of its own, the
    main thread too, so all are asked."""
    found: set[int] = set()
    if hasattr(os, "sched_getaffinity"):
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has just ended
                found |= os.sched_getaffinity(int(task.name))
    return found
