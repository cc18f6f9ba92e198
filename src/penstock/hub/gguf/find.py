"""The GGUF models in a folder."""

from __future__ import annotations

import os
import re
from pathlib import Path

from penstock.errors import ModelError

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")  # one of several files of a model


def only_gguf(folder: Path) -> Path | None:
    """The GGUF file that a folder is there for; None where it has none, or safetensors.

    The parts of one model count as one file. Raises ModelError where there are several to choose from.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return None
    if any(name.endswith(".safetensors") for name in names):
        return None
    models: dict[str, str] = {}
    for name in names:
        if name.lower().endswith(".gguf") and not name.startswith("mmproj"):  # the image part of a vision model
            match = PART.fullmatch(name)
            models.setdefault(match["stem"] if match else name, name)
    if len(models) > 1:
        shown = ", ".join(list(models.values())[:4]) + (" ..." if len(models) > 4 else "")
        raise ModelError(
            f"The folder {folder} holds {len(models)} GGUF models.",
            f"They are: {shown}",
            f"Give one of the files, for example {folder / next(iter(models.values()))}",
        )
    return folder / next(iter(models.values())) if models else None
