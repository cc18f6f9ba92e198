"""The local cache of the Hugging Face hub, read without any network and without importing its library.

Layout: `CACHE/models--ORG--NAME/refs/REVISION` holds a commit, `.../snapshots/COMMIT/` the files as links to `blobs/`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = "model.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Cached:
    """A snapshot in the cache. `missing` names the first file that an interrupted download left out, or is None."""

    path: Path
    commit: str
    missing: str | None


def cache_folder() -> Path:
    """The folder of the hub cache, by the variables that the hub's own library obeys, in its order."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return _expand(os.environ[variable])
    return home_folder() / "hub"


def home_folder() -> Path:
    """The folder of the hub's cache and token."""
    if os.environ.get("HF_HOME"):
        return _expand(os.environ["HF_HOME"])
    return _expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"


def derived_folder() -> Path:
    """Where Penstock keeps what it derived from models: $PENSTOCK_CACHE, else in the user's cache."""
    own = os.environ.get("PENSTOCK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(base) / "penstock").expanduser().absolute()


def token_source() -> str | None:
    """Where a hub token is found (never the token itself), or None."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if os.environ.get(variable):
            return f"${variable}"
    file = _expand(os.environ.get("HF_TOKEN_PATH") or str(home_folder() / "token"))
    return str(file) if file.is_file() else None


def is_offline() -> bool:
    """Whether the user has forbidden the network (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def find(name: str, revision: str | None) -> Cached | None:
    """The cached snapshot of hub model `name` (already checked to be a plain ORG/NAME) at `revision` (default main)."""
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    commit = revision or "main"
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (folder / "refs" / commit).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None
        if not _COMMIT.fullmatch(commit):  # a ref that was damaged must not become a path
            return None
    path = folder / "snapshots" / commit
    return Cached(path, commit, missing_file(path)) if path.is_dir() else None


def commits(name: str) -> list[str]:
    """The commits of a model that the cache holds, for hints."""
    folder = cache_folder() / f"models--{name.replace('/', '--')}" / "snapshots"
    return [n for n in _list(folder) if _COMMIT.fullmatch(n)]


def names() -> list[str]:
    """The models in the cache, as ORG/NAME."""
    found = [n.removeprefix("models--") for n in _list(cache_folder()) if n.startswith("models--")]
    return [n.replace("--", "/") for n in found]


def missing_file(path: Path) -> str | None:
    """The first needed file that a snapshot lacks: its config, its index's shards, or any weights at all."""
    if not (path / "config.json").exists():
        return "config.json"
    if (path / WEIGHTS).exists():
        return None
    index = path / "model.safetensors.index.json"
    if not index.exists():
        present = any(n.endswith(".safetensors") for n in _list(path))
        return None if present else WEIGHTS
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
        return min((s for s in shards if not (path / os.path.basename(s)).exists()), default=None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # damaged rather than missing: the checkpoint's own reader says how


def _expand(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _list(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
