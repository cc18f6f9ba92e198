"""From what a user typed to one model folder on disk.

In order: `demo`, a folder or a GGUF file, a name of the catalogue, a snapshot in the hub cache, a download. Whatever is
found is one snapshot of one commit, and everything else (config, tokenizer, weights) is read from that folder only.
"""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from penstock.errors import ModelError, UsageError
from penstock.hub import cache, catalogue
from penstock.hub.config import CONFIG, read_config
from penstock.hub.download import download, download_config
from penstock.hub.gguf.find import only_gguf
from penstock.hub.pickles import converted_folder, has_pickles, only_pickles
from penstock.hub.refusals import UnknownModel, Unreachable
from penstock.hub.remote_code import is_commit, lacks_code

DEMO = "demo"
_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_NAME = re.compile(f"{_PART}/{_PART}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}", re.ASCII)


@dataclass(frozen=True)
class Snapshot:
    """A model on disk. name: what the user typed, without the revision; revision: the hub's commit or None; trusted:
    the user lets Python code in it run, and has said which."""

    path: Path
    name: str
    revision: str | None
    trusted: bool = False


def resolve(name: str, revision: str | None = None, *, offline: bool | None = None, code: bool = False) -> Snapshot:
    """Find the model `name`: `demo`, a folder, a GGUF file, a name of the catalogue, or ORG/NAME[@REVISION] of the hub
    (local cache first).

    offline: never touch the network (None: as HF_HUB_OFFLINE says). code: its own Python code may run, which of a
    hub model holds for a full commit only; its .py files come with it. Raises ModelError for an unknown or unusable
    model, EnvironmentFault when it would have to be downloaded and cannot be reached.
    """
    if name == DEMO:
        from penstock.demo import model_path

        path = model_path()
        read_config(path)
        return Snapshot(path, DEMO, None)
    folder = _as_path(name)
    if name and is_folder(folder):
        if revision is not None:
            raise UsageError(f"{name} is a folder, so a revision means nothing.", "", "Leave the revision out.")
        return Snapshot(_readable(folder), name, None, code)
    if name and _is_there(folder):
        if folder.suffix.lower() != ".gguf" or not folder.exists():
            raise _not_a_folder(folder)
        if revision is not None:
            raise UsageError(f"{name} is a file, so a revision means nothing.", "", "Leave the revision out.")
        return Snapshot(_unpacked(folder), name, None)
    listed = catalogue.find(name)
    if listed is not None:
        found = resolve(listed.model, revision or listed.revision, offline=offline, code=code)
        return Snapshot(found.path, name, found.revision, found.trusted)
    hub_name, revision = _split(name, revision)
    _check_hub_name(hub_name)
    return _from_hub(
        hub_name, revision, cache.is_offline() if offline is None else offline, code and is_commit(revision)
    )


def fetch_config(name: str, revision: str | None = None, *, offline: bool | None = None) -> Path:
    """A folder with config.json of hub model `name`, and nothing of its weights. Raises as `resolve` does."""
    hub_name, revision = hub_source(name, revision)
    if cache.is_offline() if offline is None else offline:
        raise _with_matches(
            Unreachable(hub_name, f"{cache.cache_folder()} does not hold it; no hub is asked."), hub_name
        )
    try:
        return download_config(hub_name, revision)
    except UnknownModel as error:
        raise unknown(name, error.why) from error
    except Unreachable as error:
        raise _with_matches(error, name) from error


def hub_source(name: str, revision: str | None) -> tuple[str, str | None]:
    """The hub name and revision that a name means: ORG/NAME[@REVISION], or a name of the catalogue that is on the hub.

    Raises UsageError for a folder, ModelError for what cannot be a name.
    """
    listed = catalogue.find(name)
    hub_name, revision = _split(listed.model if listed else name, revision or (listed.revision if listed else None))
    if hub_name == DEMO or _is_there(_as_path(hub_name)):
        raise UsageError(f"{name} is here already: there is nothing to download.", "", "Give a hub name, ORG/NAME.")
    _check_hub_name(hub_name)
    return hub_name, revision


def hub_name_of(name: str) -> tuple[str, str | None]:
    """ORG/NAME[@REVISION] as (name, revision). Raises ModelError for what cannot be one."""
    hub_name, revision = _split(name, None)
    _check_hub_name(hub_name)
    return hub_name, revision


def _check_hub_name(name: str) -> None:
    if not _HUB_NAME.fullmatch(name) or ".." in name or "--" in name or name.endswith(".git"):
        raise unknown(
            name, f"{name[:120]!r} is neither a folder here, nor in the catalogue, nor a hub name (ORG/NAME)."
        )


def resolve_pickles(name: str, revision: str | None = None, *, offline: bool | None = None) -> Path:
    """The folder of a model that has .bin weights, for their conversion: a folder, or a hub name (fetched with them).

    Raises as `resolve` does.
    """
    folder = _as_path(name)
    if name and is_folder(folder):
        return folder.resolve()
    listed = catalogue.find(name)
    hub_name, revision = _split(listed.model if listed else name, revision or (listed.revision if listed else None))
    _check_hub_name(hub_name)
    cached = cache.find(hub_name, revision)
    if cached is not None and has_pickles(cached.path):
        return cached.path.resolve()
    if cache.is_offline() if offline is None else offline:
        raise Unreachable(hub_name, f"{cache.cache_folder()} does not hold its .bin files; the hub must not be asked.")
    try:
        return download(hub_name, revision, pickles=True)
    except UnknownModel as error:
        raise unknown(name, error.why) from error


def _from_hub(name: str, revision: str | None, offline: bool, code: bool) -> Snapshot:
    cached = cache.find(name, revision)
    if cached is not None:
        path = converted_folder(cached.path) if cached.missing else cached.path
        if path.is_dir() and cache.missing_file(path) is None and not (code and lacks_code(path)):
            read_config(path)
            return Snapshot(path, name, cached.commit, code)
        if only_gguf(cached.path) is not None:
            return Snapshot(_readable(cached.path), name, cached.commit)
        if cached.missing == cache.WEIGHTS and has_pickles(cached.path):
            raise only_pickles(cached.path, name)
    if offline:
        if cached is not None:
            why = f"Its copy in {cache.cache_folder()} is incomplete ({cached.missing} is missing); "
        elif cache.commits(name):
            why = f"{cache.cache_folder()} holds only {name}@{cache.commits(name)[0]}; "
        else:
            why = f"{cache.cache_folder()} does not hold it; "
        raise _with_matches(Unreachable(name, why + "HF_HUB_OFFLINE or --offline forbids asking the hub."), name)
    try:
        path = download(name, revision, code=code)
    except UnknownModel as error:
        raise unknown(name, error.why) from error
    except Unreachable as error:
        raise _with_matches(error, name) from error
    read_config(path)
    return Snapshot(path, name, path.name, code)


def _unpacked(file: Path) -> Path:
    """The folder made of a GGUF file."""
    from penstock.hub.gguf.folder import unpacked  # NumPy and tokenizers, which other models do without

    return unpacked(file)


def _readable(folder: Path) -> Path:
    """A model folder as it is, or the one made of the single GGUF file in it. Raises ModelError where it is neither."""
    file = only_gguf(folder)
    if file is not None:
        return _unpacked(file)
    read_config(folder)
    return folder.resolve()


def _split(name: str, revision: str | None) -> tuple[str, str | None]:
    """ORG/NAME@REVISION into its parts, the revision checked before it is used in a path or a URL."""
    hub_name, at, given = name.partition("@")
    if at and revision is not None and revision != given:
        raise UsageError(f"Two revisions: {given!r} in the name and {revision!r} as an option.", "", "Give one.")
    revision = given if at else revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision):
        raise ModelError(
            f"{revision[:80]!r} is not a revision.",
            "",
            "A revision is a branch, a tag, refs/pr/N or a commit.",
        )
    return hub_name, revision


def unknown(name: str, why: str) -> ModelError:
    """The error for a name that is nowhere, with the names that come close to it."""
    close = close_matches(name)
    other = "Try `demo`, a folder, a .gguf file, a hub name such as ORG/NAME, or a name from `penstock models`."
    hint = f"Did you mean {' or '.join(close)}?" if close else other
    return ModelError(f"There is no model {name[:120]!r}.", why, hint)


def _with_matches(error: Unreachable, name: str) -> Unreachable:
    """Without the hub nobody knows whether the name exists; what comes close here is worth a line."""
    close = [match for match in close_matches(name) if match != name]
    if close:
        error.hint = f"Did you mean {' or '.join(close)}?\n{error.hint}"
    return error


def close_matches(name: str) -> list[str]:
    """Up to three names like `name`: the demo, models of the hub cache, model folders beside the path typed, names
    of the catalogue."""
    typed = _as_path(name)
    try:
        beside = [p for p in typed.parent.iterdir() if (p / CONFIG).is_file()]
    except (OSError, ValueError):  # ValueError: a NUL byte in the name
        beside = []
    folders = {p.name: str(p) if "/" in name else f"./{p.name}" for p in beside}
    cached = {n.lower(): n for n in cache.names()}
    short = {n.rpartition("/")[2]: n for n in cached}
    known = {DEMO: DEMO, **{k.lower(): v for k, v in folders.items()}, **cached}
    found = [known[k] for k in difflib.get_close_matches(name.lower(), known, 3, 0.6)]
    found += [known[k] for k in difflib.get_close_matches(typed.name.lower(), [*folders, DEMO], 2, 0.6) if k in known]
    tail = name.lower().rpartition("/")[2]
    found += [cached[short[k]] for k in difflib.get_close_matches(tail, short, 2, 0.75)]
    found += difflib.get_close_matches(name.lower(), [entry.name for entry in catalogue.entries()], 2, 0.75)
    return list(dict.fromkeys(found))[:3]


def _as_path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # `~somebody` without such a user
        return Path(name)


def _is_there(path: Path) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # a NUL byte
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder; false too for what no path can be."""
    try:
        return path.is_dir()
    except (OSError, ValueError):  # too long a name, a NUL byte
        return False


def _not_a_folder(path: Path) -> ModelError:
    what = f"{path} is a file, not a model folder."
    if path.suffix == ".bin":
        return ModelError(what, "", f"Give {path.parent}; if it has only .bin files: penstock convert {path.parent}")
    if path.suffix == ".safetensors":
        return ModelError(what, "A model is its whole folder: weights, config.json, tokenizer.", f"Give {path.parent}")
    if path.is_symlink() and not path.exists():
        return ModelError(f"{path} is a link to nothing.", "", "Give the folder that it should point to.")
    return ModelError(what, "", "Give a folder with config.json and *.safetensors, a .gguf file, or a hub name.")
