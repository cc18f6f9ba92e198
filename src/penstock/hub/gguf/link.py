"""The link from a folder that was made of a GGUF file back to the file."""

from __future__ import annotations

import os
from pathlib import Path

from penstock.hub.config import read_settings
from penstock.hub.folder import damaged

LINK = "gguf.json"


def cache_folder() -> Path:
    """Where Penstock keeps what it derived from models: $PENSTOCK_CACHE, else in the user's cache."""
    own = os.environ.get("PENSTOCK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(base) / "penstock").expanduser().absolute() / "gguf"


def linked_files(folder: Path) -> list[Path] | None:
    """The GGUF files behind a folder, None for an ordinary one.

    Only folders in our cache have such links: in a model from elsewhere the file would name files of other people.
    """
    if folder.absolute().parent != cache_folder() or not (folder / LINK).is_file():
        return None
    names = read_settings(folder, LINK).get("files")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise damaged(folder / LINK, "It names no GGUF file.", f"Delete {folder} and run the command again.")
    return [Path(name) for name in names]
