"""How much memory this process may still take. Imports no torch."""

from __future__ import annotations

import resource
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Bytes of main memory free for this process: the machine's, its cgroups', and its own limit, the least of them."""
    candidates = [_meminfo()]
    candidates += _cgroup_headroom()
    soft, _hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        candidates.append(soft - _virtual_bytes())
    return max(0, min(candidates))


def _meminfo() -> int:
    """What the system would give, less the files that processes have mapped: it counts them as free, but the weights
    that somebody computes with come back as soon as they are taken away."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    if "MemAvailable" not in found:
        raise OSError("no MemAvailable in /proc/meminfo")
    files = found.get("Active(file)", 0) + found.get("Inactive(file)", 0)  # what is mapped may be shared memory too
    return found["MemAvailable"] - min(found.get("Mapped", 0), files)


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _cgroup_headroom() -> list[int]:
    """Headroom under each cgroup above this process that has a limit (version 2, then version 1)."""
    found: list[int] = []
    try:
        entries = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for entry in entries:
        _number, controllers, path = entry.split(":", 2)
        if controllers == "":
            root, names = _CGROUP, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        folder = root / path.lstrip("/")
        while True:
            try:
                limit = (folder / names[0]).read_text().strip()
                if limit != "max":
                    found.append(int(limit) - _working_set(folder, int((folder / names[1]).read_text())))
            except (OSError, ValueError):
                pass
            if folder in (root, root.parent):
                break
            folder = folder.parent
    return found


def _working_set(folder: Path, used: int) -> int:
    """Used bytes less the page cache that the kernel gives back under pressure: files, but those that are mapped."""
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
        found = {key.removeprefix("total_"): int(value) for key, value in map(str.split, lines)}  # those below count
    except (OSError, ValueError):
        return used
    files = found.get("inactive_file", 0) + found.get("active_file", 0)
    return max(0, used - max(0, files - found.get("file_mapped", found.get("mapped_file", 0))))
