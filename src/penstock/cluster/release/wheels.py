"""Whether a wheel runs on a target, told before it is shipped: its tags, and what its libraries really ask for."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

from penstock.cluster.release.target import CUDA_DRIVERS, Target
from penstock.errors import EnvironmentFault

# Versioned symbols that a library needs are strings of its dynamic string table, each with a zero at both ends.
_GLIBC = re.compile(rb"\0GLIBC_2\.(\d{1,3})(?:\.\d+)?(?=\0)")
_ELF_MACHINE = {0x3E: "x86_64", 0xB7: "aarch64"}
_OVERLAP = 64
_CUDA_NAME = re.compile(r"^nvidia_.*_cu(\d\d)$|^nvidia_cuda_runtime$")


@dataclass(frozen=True)
class Wheel:
    """A wheel file by its name: NAME-VERSION(-BUILD)-PYTHON-ABI-PLATFORM.whl."""

    path: Path
    name: str
    version: str
    pythons: tuple[str, ...]
    abis: tuple[str, ...]
    platforms: tuple[str, ...]


def read_wheel(path: Path) -> Wheel:
    """Parse a wheel's name. Raises EnvironmentFault when it is not one."""
    parts = path.name.removesuffix(".whl").split("-")
    if not path.name.endswith(".whl") or len(parts) not in (5, 6):
        raise EnvironmentFault(f"{path} is not a wheel.", "", "A release holds wheels only, in its folder wheels/.")
    python, abi, platform = (tuple(part.split(".")) for part in parts[-3:])
    return Wheel(path, parts[0].lower(), parts[1], python, abi, platform)


def faults(wheel: Wheel, target: Target) -> Iterator[str]:
    """Why the wheel does not run on the target; nothing when it does."""
    if not any(_python_fits(python, target) for python in wheel.pythons) or not set(wheel.abis) & set(target.abis):
        yield f"is for {'.'.join(wheel.pythons)} ({'.'.join(wheel.abis)}), the target has Python 3.{target.python}"
    plain = [platform for platform in wheel.platforms if platform != "any"]
    if plain and not set(plain) & set(target.platforms):
        yield f"is for {', '.join(plain)}, the target has glibc 2.{target.glibc} on {target.arch}"
    try:
        needs, machines = _libraries(wheel.path)
        metadata = read_metadata(wheel.path)
    except (zipfile.BadZipFile, OSError, KeyError) as error:
        yield f"is damaged: {error}"
        return
    for library, minor in sorted(needs.items(), key=lambda item: -item[1])[:1]:
        if minor > target.glibc:
            yield f"needs glibc 2.{minor} ({library}), the target has 2.{target.glibc}"
    if machines - {target.arch}:
        yield f"holds libraries for {', '.join(sorted(machines - {target.arch}))}, the target is {target.arch}"
    yield from _cuda_faults(wheel, metadata.get_all("Requires-Dist") or [], target)


def _python_fits(tag: str, target: Target) -> bool:
    match = re.fullmatch(r"(py|cp)3(\d*)", tag)
    if match is None:
        return False
    minor = int(match[2]) if match[2] else 0
    return minor <= target.python  # cp38-abi3 runs on every later one; the ABI tag refuses what does not


def _libraries(path: Path) -> tuple[dict[str, int], set[str]]:
    """For each shared library the newest minor version of glibc that it asks for; and their processors."""
    needs: dict[str, int] = {}
    machines: set[str] = set()
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if ".so" not in Path(entry.filename).name:
                continue
            with archive.open(entry) as stream:
                head = stream.read(2**20)
                if head[:4] != b"\x7fELF":
                    continue
                machines.add(_ELF_MACHINE.get(int.from_bytes(head[18:20], "little"), "another processor"))
                newest, tail = -1, b""
                while head:
                    newest = max([newest, *(int(minor) for minor in _GLIBC.findall(tail + head))])
                    tail, head = head[-_OVERLAP:], stream.read(2**22)
            if newest >= 0:
                needs[entry.filename] = newest
    return needs, machines


def _cuda_faults(wheel: Wheel, requires: list[str], target: Target) -> Iterator[str]:
    """A driver too old for the CUDA that a wheel is made for; a PyTorch without CUDA where there are cards."""
    series = _cuda_series(wheel, requires)
    if series is None:
        if wheel.name == "torch" and target.driver is not None:
            yield "is PyTorch for processors, the target has NVIDIA cards"
        return
    if target.driver is None:
        return  # runs on processors, only larger than it must be
    least = CUDA_DRIVERS.get(series)
    if least is None or target.driver[:2] < least:
        have = ".".join(map(str, target.driver))
        want = ".".join(map(str, least)) if least else "that is not known"
        yield f"is made for CUDA {series}, which needs driver {want}; the target has {have}"


def _cuda_series(wheel: Wheel, requires: list[str]) -> int | None:
    """The series of CUDA of a PyTorch or NVIDIA wheel: by its version (2.9+cu128) or what it requires."""
    local = re.search(r"\+cu(\d\d)", wheel.version)
    if local:
        return int(local[1])
    named = _CUDA_NAME.match(wheel.name)
    if named:
        return int(named[1] or wheel.version.split(".")[0])
    if wheel.name == "torch" and "+cpu" not in wheel.version:
        for line in requires:
            match = re.match(r"(?:nvidia-[a-z-]*|cuda-[a-z-]*?)(?:-cu|\[[^]]*\]==|==)(\d\d)", line)
            if match:
                return int(match[1])
    return None


def read_metadata(path: Path) -> Message:
    """The METADATA of a wheel."""
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA") and n.count("/") == 1)
        return HeaderParser().parsestr(archive.read(name).decode("utf-8", "replace"))


def sha256(path: Path) -> str:
    """The hash of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
