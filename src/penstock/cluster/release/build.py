"""Building a release: wheels for a target, their hashes and licences, the installer, the modulefiles."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import urlsplit

from penstock import __version__
from penstock.cluster.release.check import Finding, check_wheels
from penstock.cluster.release.target import Target
from penstock.cluster.release.wheels import Wheel, read_metadata, read_wheel, sha256
from penstock.errors import EnvironmentFault, UsageError

_HERE = Path(__file__).parent
_FILES = ("install.sh", "finish.py", "module.lua", "module.tcl")
_LICENCE = re.compile(r"(licen[cs]e|copying|notice|authors)", re.IGNORECASE)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_INDEX = "https://download.pytorch.org/whl/cu{series}"


def build_release(
    target: Target,
    folder: Path,
    source: Path | None,
    indexes: tuple[str, ...],
    extras: tuple[str, ...],
    constraints: Path | None,
    say: Callable[[str], None],
) -> Path:
    """Make `folder`/penstock-VERSION-TARGET and return it.

    source: the source tree or a wheel of Penstock (None: the tree that this Penstock runs from); indexes: further
    package indexes; extras: further requirements; constraints: a file of versions, all as pip has them (None: the
    source tree's). Raises EnvironmentFault when pip cannot find a wheel for the target, or when one that it found does
    not run there.
    """
    release = folder / f"penstock-{__version__}-{target}"
    if release.exists():
        raise UsageError(f"{release} is there already.", "", "Remove it first, or give another folder (--output).")
    making = release.with_name(f".{release.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    wheels = making / "wheels"
    wheels.mkdir(parents=True)
    tree = source or source_tree()
    own = _own_wheel(tree, wheels, target, say)
    say(f"fetching the wheels that {own.name} needs on {target}")
    _download(own.path, wheels, target, constraints or _constraints(tree), indexes, extras)
    found = [read_wheel(path) for path in sorted(wheels.iterdir())]
    bad = check_wheels([wheel.path for wheel in found], target)
    if bad:
        raise refusal(bad, target)
    say(f"{len(found)} wheels, {sum(w.path.stat().st_size for w in found) / 1e9:.2f} GB, all run on {target}")
    assemble(making, target, found)
    making.replace(release)
    return release


def source_tree() -> Path:
    """The source tree that this Penstock runs from. Raises UsageError when it was installed from a wheel."""
    for folder in Path(__file__).parents:
        if (folder / "pyproject.toml").is_file() and (folder / "CMakeLists.txt").is_file():
            return folder
    raise UsageError(
        "This Penstock was not installed from its source tree.", "", "Give the tree, or its wheel: --source DIR|WHEEL"
    )


def refusal(findings: list[Finding], target: Target) -> EnvironmentFault:
    """What does not run there, in the lines of an error."""
    lines = [f"{finding.wheel} {finding.fault}." for finding in findings]
    more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
    return EnvironmentFault(
        f"{len(lines)} wheels do not run on {target}.",
        "\n".join(lines[:3]) + more,
        "Build for that target with other versions (--constraint FILE) or from another index (--index URL).",
    )


def _own_wheel(tree: Path, wheels: Path, target: Target, say: Callable[[str], None]) -> Wheel:
    """Penstock's own wheel, compiled here; without its kernels where the target cannot load what this machine makes."""
    if tree.is_file():
        shutil.copy(tree, wheels)
        return read_wheel(wheels / tree.name)
    say("building Penstock's own wheel")
    _pip(["wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(tree)], "Penstock's wheel cannot be built")
    wheel = read_wheel(next(wheels.iterdir()))
    bad = check_wheels([wheel.path], target)
    if not bad:
        return wheel
    say(f"the compiled kernels {bad[0].fault}: built without them, slower, with the same results")
    wheel.path.unlink()
    command = ["wheel", "--quiet", "--no-deps", "--config-settings=wheel.cmake=false", "--wheel-dir", str(wheels)]
    _pip([*command, str(tree)], "Penstock's wheel cannot be built")
    return read_wheel(next(wheels.iterdir()))


def _constraints(tree: Path) -> Path | None:
    file = tree / "constraints.txt"
    return file if tree.is_dir() and file.is_file() else None


def _download(
    own: Path, wheels: Path, target: Target, constraints: Path | None, indexes: tuple[str, ...], extras: tuple[str, ...]
) -> None:
    series = target.cuda()
    torch = CPU_INDEX if series is None else CUDA_INDEX.format(series={11: "118", 12: "126"}.get(series, "130"))
    command = [
        "download",
        "--quiet",
        "--only-binary=:all:",
        "--dest",
        str(wheels),
        f"--python-version=3.{target.python}",
    ]
    command += ["--implementation=cp", *(f"--abi={abi}" for abi in target.abis)]
    command += [f"--platform={platform}" for platform in target.platforms]
    command += [f"--constraint={constraints}"] if constraints else []
    command += [f"--extra-index-url={index}" for index in ([*indexes, torch] if _reachable(torch) else indexes)]
    _pip(
        [*command, str(own), "pip", *extras],
        f"pip finds no wheels for {target}",
        "Name an index that has them (--index URL), or other versions (--constraint FILE).",
    )


def _reachable(url: str) -> bool:
    """Whether a package index answers at all; pip would try for minutes, and the wheels may be at hand elsewhere."""
    try:
        with socket.create_connection((urlsplit(url).hostname or "", 443), timeout=5):
            return True
    except OSError:
        return False


def _pip(arguments: list[str], what: str, hint: str = "") -> None:
    if importlib.util.find_spec("pip") is None:
        raise EnvironmentFault("A release is built with pip, which is missing here.", "", "python -m ensurepip")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise EnvironmentFault(f"{what}.", "\n".join(line[:200] for line in errors[-2:]), hint)


def _licences(wheels: Iterable[Wheel], folder: Path) -> None:
    """Every licence text of every wheel, and a table of them."""
    folder.mkdir()
    rows = []
    for wheel in wheels:
        metadata = read_metadata(wheel.path)
        classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or [] if c.startswith("License")]
        stated = (metadata.get("License-Expression") or metadata.get("License") or "").strip().splitlines()
        rows.append(f"{wheel.name} {wheel.version}: {(stated or classifiers or ['see its files'])[0][:100]}")
        with zipfile.ZipFile(wheel.path) as archive:
            for name in archive.namelist():
                parts = name.split("/")
                if len(parts) > 1 and parts[0].endswith(".dist-info") and _LICENCE.search(parts[-1]) and parts[-1]:
                    place = folder / wheel.name / "-".join(part for part in parts[1:] if part != "licenses")
                    place.parent.mkdir(exist_ok=True)
                    place.write_bytes(archive.read(name))
    (folder / "README").write_text("Licences of the packages in this release.\n\n" + "\n".join(rows) + "\n")


def assemble(release: Path, target: Target, wheels: list[Wheel]) -> None:
    """Everything of a release but the wheels, which lie in its folder already; the hashes last."""
    _licences(wheels, release / "licenses")
    for name in _FILES:
        shutil.copyfile(_HERE / name, release / name)
    (release / "install.sh").chmod(0o755)
    (release / "version").write_text(f"{__version__}\n")
    (release / "target").write_text(f"target={target}\npython=3.{target.python}\n")
    lines = [f"{w.name}=={w.version} --hash=sha256:{sha256(w.path)}" for w in wheels if w.name != "pip"]
    (release / "requirements.txt").write_text("\n".join(lines) + "\n")
    facts = {
        "version": __version__,
        "target": str(target),
        "packages": {w.name: w.version for w in wheels},
        "bytes": sum(w.path.stat().st_size for w in wheels),
    }
    (release / "release.json").write_text(json.dumps(facts, indent=1) + "\n")
    files = sorted(path for path in release.rglob("*") if path.is_file())
    sums = [f"{sha256(path)}  {path.relative_to(release)}" for path in files]
    (release / "SHA256SUMS").write_text("\n".join(sums) + "\n")


def pack(release: Path) -> Path:
    """The release as one tar file beside it (wheels are compressed already), readable by everybody."""
    tar = release.with_name(release.name + ".tar")
    part = tar.with_name(f".{tar.name}.part")

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
        return entry

    with tarfile.open(part, "w") as archive:
        archive.add(release, release.name, filter=plain)
    os.replace(part, tar)
    return tar
