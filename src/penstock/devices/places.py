"""Which processors a process keeps to, and whose memory it takes. Imports no torch."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from penstock.errors import EnvironmentFault, UsageError

_NODES = Path("/sys/devices/system/node")
_MOST = 2**16  # processors, and what a number in a list may be
_MOST_NODES = 1024
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237, "ppc64le": 261}  # numbers of the system call
_PREFERRED = 1  # MPOL_PREFERRED: of this node while it has any
_HINT = "--cpus takes 0-15, 0-7,16-23, or a node of memory: node0"


def nodes() -> dict[int, set[int]]:
    """The NUMA nodes that have memory and processors of their own, with these; empty where the system tells nothing."""
    found = {}
    for folder in _NODES.glob("node[0-9]*"):
        try:
            cpus = parse((folder / "cpulist").read_text().strip())
        except (OSError, UsageError):
            continue
        found[int(folder.name.removeprefix("node"))] = cpus
    return dict(sorted(found.items()))


def parse(text: str) -> set[int]:
    """The numbers in a list such as 0-3,8 (as the kernel writes them). Raises UsageError."""
    cpus: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else not last)) or len(first + last) > 10:
            raise UsageError(f"{text[:60]!r} is no list of processors.", hint=_HINT)
        low, high = int(first), int(last or first)
        if not low <= high < _MOST:
            raise UsageError(f"{text[:60]!r} is no list of processors.", hint=_HINT)
        cpus |= set(range(low, high + 1))
    return cpus


def keep_to(text: str) -> None:
    """Keep this process, and those that it starts from now on, to some processors.

    text: a list, or `nodeN`, which then also says where memory is taken from: a processor reads that of another node at
    half the speed or less. A list that lies in one node says it too. Raises UsageError, EnvironmentFault.
    """
    known = nodes()
    if text.startswith("node"):
        number = text.removeprefix("node")
        if not number.isdecimal() or int(number) not in known:
            have = ", ".join(f"node{n}" for n in known) or "none that the system tells of"
            raise UsageError(f"There is no {text[:20]!r}.", f"Nodes here: {have}.", _HINT)
        asked = known[int(number)]
    else:
        asked = parse(text)
    if not hasattr(os, "sched_setaffinity"):
        raise EnvironmentFault("This system cannot keep a process to some processors.", "It takes Linux.")
    ours = os.sched_getaffinity(0)
    if not asked & ours:
        raise UsageError(f"None of the processors {text[:60]} is ours.", f"Ours are {sorted(ours)[:64]}.", _HINT)
    os.sched_setaffinity(0, asked & ours)
    home = [node for node, cpus in known.items() if asked & ours <= cpus]
    if len(known) > 1 and home:
        _prefer(home[0])


def _prefer(node: int) -> None:
    """Take memory from a node while it has any; where the system does not let us, it stays as it was."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None or node >= _MOST_NODES:
        return
    mask = (ctypes.c_ulong * (_MOST_NODES // 64))()
    mask[node // 64] = 1 << node % 64
    ctypes.CDLL(None).syscall(ctypes.c_long(number), ctypes.c_long(_PREFERRED), mask, ctypes.c_ulong(_MOST_NODES))
