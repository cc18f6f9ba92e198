"""What the system counts for us: bytes that a process has read from disk, energy that the processor has used."""

from __future__ import annotations

from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


def disk_bytes(pid: int | None = None) -> int | None:
    """Bytes that a process (None: this one) has fetched from storage; what the page cache had costs none. None where
    the system does not tell."""
    try:
        lines = Path(f"/proc/{pid or 'self'}/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


class EnergyMeter:
    """Joules of all processor packages since it was made, by Intel's RAPL counters (AMD has them too)."""

    def __init__(self) -> None:
        self._start = _packages()

    def joules(self) -> float | None:
        """None where the counters are missing or only root may read them. A counter wraps around at most once
        between."""
        if not self._start:
            return None
        used = 0
        for zone, (value, span) in _packages().items():
            if zone in self._start:
                used += (value - self._start[zone][0]) % (span or 2**63)
        return used / 1e6


def _packages() -> dict[str, tuple[int, int]]:
    """Microjoules and the range of the counter of each package."""
    found = {}
    for zone in sorted(_POWERCAP.glob("intel-rapl:*")):
        if zone.name.count(":") > 1:  # a part of a package
            continue
        try:
            found[zone.name] = (
                int((zone / "energy_uj").read_text()),
                int((zone / "max_energy_range_uj").read_text()) + 1,
            )
        except (OSError, ValueError):
            continue
    return found
