"""From a model with .bin files to one with safetensors: an explicit step, each file read by a process in a jail."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.errors import EnvironmentFault, ModelError, ResourceError
from penstock.hub.checkpoint import INDEX, MAX_HEADER, SINGLE, parse_object, read_checkpoint
from penstock.hub.config import read_config
from penstock.hub.convert_child import LEAST_SECONDS, SECONDS_PER_GB
from penstock.hub.download import ALLOW
from penstock.hub.folder import damaged, member, read_small, reason
from penstock.hub.pickles import PICKLE_INDEX, converted_folder, pickle_names

_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT")
_SMALL = [pattern for pattern in ALLOW if pattern != "*.safetensors"]


@dataclass(frozen=True)
class Converted:
    """What was made. tensor_bytes: of all tensors together."""

    folder: Path
    tensors: int
    tensor_bytes: int


def convert(folder: Path, to: Path | None, on_file: Callable[[str, int], None]) -> Converted:
    """Convert the .bin weights of a model folder.

    The result goes to `to` (made; must be empty), else beside a hub snapshot (`converted/COMMIT`, where the model's
    name finds it), else into the folder itself. on_file is told each file and its bytes before it is read. Raises
    ModelError for a file that is no list of tensors, ResourceError where the disk is too small.
    """
    read_config(folder)
    target = to or (converted_folder(folder) if folder.parent.name == "snapshots" else folder)
    target = target.absolute()
    if to is None and target.is_dir() and any(name.endswith(".safetensors") for name in os.listdir(target)):
        return _converted(target)  # by an earlier run
    files = _files(folder)
    total = sum(member(folder, name).stat().st_size for name in files)
    home = target if target == folder.absolute() else target.parent
    if to is not None and to.exists() and any(to.iterdir()):
        raise EnvironmentFault(f"The folder {to} is not empty.", "", "Give a folder that does not exist yet.")
    try:
        home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(home).free
        if total > free:
            raise ResourceError(
                f"Too little disk: the converted model takes {total / 1e9:.1f} GB, {home} has {free / 1e9:.1f} GB.",
                "",
                "Free some space, or give --to a folder on another disk.",
            )
        part = Path(tempfile.mkdtemp(prefix=".converting-", dir=home))
        try:
            _convert_files(folder, files, part, on_file)
            if target != folder.absolute():
                _copy_small(folder, part)
            _move(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise EnvironmentFault(f"The converted model cannot be written to {home}: {reason(error)}.") from None
    return _converted(target)


def _converted(folder: Path) -> Converted:
    """What a folder holds, checked. Raises ModelError."""
    entries = read_checkpoint(folder)
    return Converted(folder, len(entries), sum(entry.end - entry.start for entry in entries.values()))


def _files(folder: Path) -> list[str]:
    """The .bin files to convert: those of the index, or all. Raises ModelError where there are none."""
    names = pickle_names(os.listdir(folder))
    if (folder / PICKLE_INDEX).exists():
        weight_map = _index(folder)
        listed = sorted(set(weight_map.values()))
        if not all(isinstance(name, str) and name in names for name in listed):
            missing = next(name for name in listed if name not in names)
            raise damaged(folder / PICKLE_INDEX, f"It names {str(missing)[:80]!r}, which is not here.")
        return listed
    if not names:
        raise ModelError(
            f"The model in {folder} has no pytorch_model*.bin to convert.",
            f"It has: {', '.join(sorted(os.listdir(folder))[:5])}",
            "If it has safetensors, it needs no conversion.",
        )
    return names


def _index(folder: Path) -> dict[str, Any]:
    index = parse_object(folder / PICKLE_INDEX, read_small(folder, PICKLE_INDEX, MAX_HEADER))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise damaged(folder / PICKLE_INDEX, "It has no weight_map.")
    return weight_map


def _convert_files(folder: Path, files: list[str], part: Path, on_file: Callable[[str, int], None]) -> None:
    """Every file into `part`, with an index where there are several."""
    made: dict[str, int] = {}
    places: dict[str, str] = {}
    for name in files:
        source = member(folder, name)
        on_file(name, source.stat().st_size)
        single = len(files) == 1
        renamed = SINGLE if single else name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        found = _convert_file(source, folder / name, part / renamed)
        twice = next((tensor for tensor in found if tensor in made), None)
        if twice is not None:
            raise damaged(folder / name, f"It has the tensor {twice[:80]!r}, which another file has, too.")
        made |= found
        places |= dict.fromkeys(found, renamed)
    if (folder / PICKLE_INDEX).exists():
        lost = next((tensor for tensor in _index(folder) if tensor not in made), None)
        if lost is not None:
            raise damaged(folder / PICKLE_INDEX, f"It names the tensor {lost[:80]!r}, which no file has.")
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(made.values())}, "weight_map": places}
        (part / INDEX).write_text(json.dumps(index), encoding="utf-8")


def _convert_file(source: Path, shown: Path, target: Path) -> dict[str, int]:
    """One file by a process in a jail. Returns the bytes of each tensor."""
    with source.open("rb") as file, target.open("xb") as out:
        seconds = LEAST_SECONDS + SECONDS_PER_GB * os.fstat(file.fileno()).st_size // 10**9
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "penstock.hub.convert_child", str(file.fileno()), str(out.fileno())],
                pass_fds=(file.fileno(), out.fileno()),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env={**environment, "OPENBLAS_NUM_THREADS": "1"},
                timeout=seconds + 30,
                check=False,
            )
            report = json.loads(done.stdout) if done.returncode == 0 else {}
        except (subprocess.TimeoutExpired, ValueError):
            report = {}
    if "failed" in report:
        raise EnvironmentFault(f"{target} cannot be written: {report['failed']}.")
    if "tensors" not in report:
        why = str(report.get("refused", "it needs more time or memory than such a file can"))
        raise damaged(shown, f"It is no list of tensors: {why}.", "Do not use this file; take a safetensors revision.")
    tensors: dict[str, int] = report["tensors"]
    return tensors


def _copy_small(folder: Path, part: Path) -> None:
    """Configuration and tokenizer, so that the new folder is a model by itself."""
    for name in os.listdir(folder):
        wanted = any(fnmatch.fnmatch(name, pattern) for pattern in _SMALL)
        if wanted and name not in (PICKLE_INDEX, INDEX) and (folder / name).is_file():
            shutil.copyfile(member(folder, name), part / name)


def _move(part: Path, target: Path) -> None:
    """Put what was made in its place, the index last: until then the folder is what it was."""
    names = sorted(os.listdir(part), key=lambda name: (name == INDEX, name))
    target.mkdir(exist_ok=True)
    for name in names:
        os.replace(part / name, target / name)
