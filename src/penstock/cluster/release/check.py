"""Does a release run on a target, and is it whole: told before it is shipped, and again where it arrives."""

from __future__ import annotations

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from penstock.cluster.release.target import Target
from penstock.cluster.release.wheels import faults, read_wheel, sha256
from penstock.errors import EnvironmentFault

_SUM = re.compile(r"([0-9a-f]{64})  ([^\n]+)")


@dataclass(frozen=True)
class Finding:
    """A wheel, or a file of the release, and what is wrong with it."""

    wheel: str
    fault: str


def check_wheels(wheels: Iterable[Path], target: Target) -> list[Finding]:
    """Every reason why a wheel does not run on the target."""

    def check(path: Path) -> list[Finding]:
        return [Finding(path.name, fault) for fault in faults(read_wheel(path), target)]

    with ThreadPoolExecutor(2) as pool:
        return [finding for found in pool.map(check, sorted(wheels)) for finding in found]


def check_release(release: Path, target: Target) -> list[Finding]:
    """What stands in the way of installing a release folder on a target: wheels that do not run, damaged files.

    Raises EnvironmentFault when the folder is no release.
    """
    wheels = sorted((release / "wheels").glob("*.whl"))
    if not wheels or not (release / "SHA256SUMS").is_file():
        raise EnvironmentFault(
            f"{release} is not a release.", "", "Make one with `penstock release build`; of a .tar, unpack it first."
        )
    return [*_damaged(release), *check_wheels(wheels, target)]


def _damaged(release: Path) -> list[Finding]:
    found = []
    listed = _SUM.findall((release / "SHA256SUMS").read_text(encoding="utf-8", errors="replace"))
    for digest, name in listed:
        path = release / name
        if not path.is_file():
            found.append(Finding(name, "is missing"))
        elif sha256(path) != digest:
            found.append(Finding(name, "is damaged: its SHA-256 is not the one recorded"))
    unlisted = {path.name for path in (release / "wheels").iterdir()} - {Path(name).name for _, name in listed}
    return found + [Finding(name, "is not listed in SHA256SUMS") for name in sorted(unlisted)]
