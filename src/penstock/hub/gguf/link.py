"""The link from a folder that was made of a GGUF file back to the file."""

from __future__ import annotations

from pathlib import Path

from penstock.hub.cache import derived_folder
from penstock.hub.config import read_settings
from penstock.hub.folder import damaged

LINK = "gguf.json"


def cache_folder() -> Path:
    """Where folders lie that were made of GGUF files."""
    return derived_folder() / "gguf"


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
