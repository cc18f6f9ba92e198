"""How many cores this process may use, OpenMP bound to them, and threads that step back. Imports no torch."""

from __future__ import annotations

import math
import os
import sys
import threading
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Physical cores this process may compute on: the affinity mask, the cgroup's quota, one thread a core."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores = {_core_of(cpu) for cpu in cpus}
    quota = _cgroup_quota()
    return max(1, min(len(cores), math.floor(quota) if quota else len(cores)))


def bind_threads(n: int | None = None) -> int:
    """Set the OpenMP environment; must run before torch is imported. Returns the number of threads.

    Threads are bound to cores when they take every core this process may use: unbound OpenMP loops stall for whole
    scheduler quanta as soon as another process runs. With fewer threads than cores they stay free, because two
    processes would bind to the same first cores. What the user has set already stays.
    """
    cores = usable_cores()
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # OpenMP allows a list, one number a level
    n = n or (int(asked) if asked.isdecimal() else 0) or cores
    os.environ["OMP_NUM_THREADS"] = str(n)
    if n == cores > 1:
        os.environ.setdefault("OMP_PROC_BIND", "true")
        os.environ.setdefault("OMP_PLACES", "cores")
    return n


def be_polite(niceness: int) -> None:
    """Let the other threads of this process go first; Linux alone has a niceness for each thread."""
    if sys.platform == "linux" and niceness:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


def _core_of(cpu: int) -> str:
    """An identity of the physical core behind a logical processor."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_quota() -> float | None:
    """Processors that the cgroup (version 2, else 1) grants, or None for no limit."""
    try:
        quota, period = (_own_cgroup() / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        pass
    try:
        base = _CGROUP / "cpu"
        quota_us = int((base / "cpu.cfs_quota_us").read_text())
        return quota_us / int((base / "cpu.cfs_period_us").read_text()) if quota_us > 0 else None
    except (OSError, ValueError):
        return None


def _own_cgroup() -> Path:
    """Folder of this process's cgroup (version 2)."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return _CGROUP / line[3:].lstrip("/")
    return _CGROUP
