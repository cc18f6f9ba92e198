"""Which model folders have their weights only as .bin files, and where the converted ones lie."""

from __future__ import annotations

import os
import re
from pathlib import Path

from penstock.errors import ModelError

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
_SHARD = re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin")


def pickle_names(names: list[str]) -> list[str]:
    """The .bin weights among the files of a folder, sorted."""
    return sorted(name for name in names if name == PICKLE or _SHARD.fullmatch(name))


def has_pickles(folder: Path) -> bool:
    """Whether a folder has .bin weights."""
    try:
        return bool(pickle_names(os.listdir(folder)))
    except OSError:
        return False


def converted_folder(snapshot: Path) -> Path:
    """Where the converted form of a snapshot in the hub cache lies: beside the snapshots, under the same commit."""
    return snapshot.parent.parent / "converted" / snapshot.name


def only_pickles(folder: Path, name: str) -> ModelError:
    """The error for a model whose weights are all pickles. name: what the user would type for it."""
    return ModelError(
        f"The model in {folder} has no *.safetensors weights.",
        "It has .bin files: those are pickles, which can run code when read, so they are never loaded.",
        f"Convert them once, in a sandbox: penstock convert {name}",
    )
