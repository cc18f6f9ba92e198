"""The files of one model folder, opened only after their names and links are checked.

A checkpoint names its own files (shards in an index, templates in a config), so a name is data from a stranger: it
must be a plain file name, and after links are followed it must still lie in the folder or in the hub cache's own store.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from penstock.errors import ModelError

AGAIN = "Delete the file and run the command again (hub models are fetched anew), or copy the folder again."


def damaged(file: Path, why: str, hint: str = AGAIN) -> ModelError:
    """The error for a file whose content cannot be used; `why` completes the sentence of `what`."""
    return ModelError(f"The model file {file} cannot be used.", why, hint)


def allowed_roots(folder: Path) -> list[Path]:
    """The folders that files of this model may lie in once links are followed.

    The hub cache keeps `models--org--name/snapshots/COMMIT/FILE` as links to `models--org--name/blobs/HASH`.
    """
    root = folder.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append((root.parent.parent / "blobs").resolve())
    return roots


def is_plain_name(name: str) -> bool:
    """Whether a string is one file name and nothing else: no path, no drive, no control character."""
    return (
        0 < len(name) <= 255 and name not in (".", "..") and not any(c in "/\\:" or not c.isprintable() for c in name)
    )


def member(folder: Path, name: str) -> Path:
    """The resolved path of the file `name` of a model folder.

    Raises ModelError when the name is a path, the file is missing or not a regular file, or a link leads outside.
    """
    if not is_plain_name(name):
        raise ModelError(
            f"The model in {folder} names the file {name[:80]!r}, which is not a plain file name.",
            "A checkpoint may only name files in its own folder; this one may have been made to read others.",
            "Do not use this copy; download the model again from its publisher.",
        )
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except FileNotFoundError:
        why = "It is a link to nothing." if path.is_symlink() else "It is missing."
        raise damaged(path, why, "Download the model again, or copy the whole folder again.") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise damaged(path, f"It cannot be reached: {reason(error)}.") from None
    if not any(real.is_relative_to(root) for root in allowed_roots(folder)):
        raise ModelError(
            f"The model file {path} is a link that leads out of the model's folder.",
            f"It points to {real}.",
            "Replace the link by the file itself, or give the folder that holds all files.",
        )
    if not stat.S_ISREG(mode):
        raise damaged(path, "It is not a regular file.", "Copy the whole folder again.")
    return real


def read_small(folder: Path, name: str, limit: int) -> bytes:
    """The bytes of a small file of the folder, refused beyond `limit` bytes before they are read."""
    real = member(folder, name)
    try:
        with real.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise damaged(folder / name, f"It has {size:,} bytes; more than {limit:,} is not believable.")
            return file.read(limit + 1)
    except OSError as error:
        raise damaged(folder / name, f"It cannot be read: {reason(error)}.") from None


def reason(error: Exception) -> str:
    """The operating system's words for an error, without the number and the path."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
