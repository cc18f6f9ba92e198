"""The machine that a release is for: its Python, its C library, its processor, its NVIDIA driver."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

from penstock.errors import UsageError

_FORM = re.compile(
    r"py3\.(?P<python>\d{1,2})-glibc2\.(?P<glibc>\d{1,3})-(?P<arch>x86_64|aarch64)-(?P<device>cpu|driver(?P<driver>\d[\d.]*))"
)
EXAMPLE = "py3.11-glibc2.34-x86_64-cpu"
_LEGACY = ((17, "manylinux2014"), (12, "manylinux2010"), (5, "manylinux1"))
# The least driver on which programs made for a CUDA of this series run (NVIDIA, CUDA compatibility, minor versions).
CUDA_DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 65)}


@dataclass(frozen=True)
class Target:
    """python: the minor version of 3; glibc: the minor version of 2; driver: of NVIDIA, None for processors alone."""

    python: int
    glibc: int
    arch: str
    driver: tuple[int, ...] | None

    def __str__(self) -> str:
        device = "cpu" if self.driver is None else "driver" + ".".join(map(str, self.driver))
        return f"py3.{self.python}-glibc2.{self.glibc}-{self.arch}-{device}"

    @property
    def platforms(self) -> list[str]:
        """The platform tags of wheels that this C library and processor can load, the newest first."""
        tags: list[str] = []
        for minor in range(self.glibc, 4, -1):
            tags.append(f"manylinux_2_{minor}_{self.arch}")
            tags += [f"{name}_{self.arch}" for at, name in _LEGACY if at == minor]
        return [*dict.fromkeys(tags), f"linux_{self.arch}"]

    @property
    def abis(self) -> list[str]:
        """The ABI tags of wheels for this Python."""
        return [f"cp3{self.python}", "abi3", "none"]

    def cuda(self) -> int | None:
        """The newest series of CUDA that the driver runs, None without a driver."""
        if self.driver is None:
            return None
        fitting = [series for series, least in CUDA_DRIVERS.items() if self.driver[:2] >= least]
        return max(fitting, default=None)


def parse_target(text: str) -> Target:
    """`py3.11-glibc2.34-x86_64-cpu`, or `...-driver550.54` for a machine with NVIDIA cards. Raises UsageError."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(
            f"{text[:80]!r} is no target.",
            f"It names Python, C library, processor and NVIDIA driver: {EXAMPLE}, or ...-driver550.54.",
            "There: `python3 --version`, `ldd --version`, `nvidia-smi`. This machine's: `penstock release target`.",
        )
    driver = match["driver"]
    return Target(
        int(match["python"]),
        int(match["glibc"]),
        match["arch"],
        tuple(int(part) for part in driver.split(".") if part) if driver else None,
    )


def this_machine() -> Target:
    """The target that this machine is."""
    library, version = platform.libc_ver()
    glibc = int(version.split(".")[1]) if library == "glibc" else 0
    return Target(sys.version_info.minor, glibc, platform.machine(), _driver())


def _driver() -> tuple[int, ...] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = done.stdout.split()
    return tuple(map(int, words[0].split("."))) if words and re.fullmatch(r"\d[\d.]*\d", words[0]) else None
