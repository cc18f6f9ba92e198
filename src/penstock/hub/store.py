"""Where a download goes: the hub cache, or a plain folder; and the record of what was verified there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from penstock.errors import EnvironmentFault
from penstock.hub.cache import cache_folder
from penstock.hub.transfer import PART, RemoteFile

RECORD = ".penstock-verified.json"
COMMIT = re.compile(r"[0-9a-f]{40}")


class CacheStore:
    """The hub cache: content by hash in blobs/, a folder of links a commit, refs/ from branches to commits."""

    def __init__(self, name: str) -> None:
        self.root = cache_folder()
        self._model = self.root / f"models--{name.replace('/', '--')}"
        self._seen = _Record(self._model / RECORD)

    def check(self) -> None:
        """Refuse a cache that strangers may change."""
        for folder in (self.root, self._model):
            with contextlib.suppress(FileNotFoundError):
                mode = folder.stat().st_mode
                if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                    raise EnvironmentFault(
                        f"Everybody may write to the hub cache {folder}: anyone could change the models in it.",
                        "",
                        f"Take that right away (chmod o-w {folder}), or set HF_HOME to a folder of your own.",
                    )

    def file(self, file: RemoteFile) -> Path:
        return self._model / "blobs" / file.blob

    def partial_bytes(self, files: list[RemoteFile]) -> int:
        return _part_bytes(self.file(file) for file in files)

    def verified(self, file: RemoteFile) -> bool:
        return self._seen.has(file.blob, self.file(file))

    def record(self, file: RemoteFile) -> None:
        self._seen.add(file.blob, self.file(file))

    def finish(self, commit: str, revision: str | None, files: list[RemoteFile]) -> Path:
        """The folder of the commit, config.json last, for it is what says that the rest is there; then the ref."""
        folder = self._model / "snapshots" / commit
        for file in sorted(files, key=lambda f: f.name == "config.json"):
            link = folder / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.relpath(self.file(file), link.parent)
            if not (link.is_symlink() and os.readlink(link) == target):
                _replace(link, partial(Path.symlink_to, target=target))
        wanted = revision or "main"
        if not COMMIT.fullmatch(wanted):
            ref = self._model / "refs" / wanted
            ref.parent.mkdir(parents=True, exist_ok=True)
            _replace(ref, partial(Path.write_text, data=commit))
        return folder


class FolderStore:
    """A plain folder with the files under their own names."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self._seen = _Record(self.root / RECORD)

    def check(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)

    def file(self, file: RemoteFile) -> Path:
        return self.root / file.name

    def partial_bytes(self, files: list[RemoteFile]) -> int:
        return _part_bytes(self.file(file) for file in files)

    def verified(self, file: RemoteFile) -> bool:
        return self._seen.has(f"{file.name} {file.blob}", self.file(file))

    def record(self, file: RemoteFile) -> None:
        self._seen.add(f"{file.name} {file.blob}", self.file(file))

    def finish(self, commit: str, revision: str | None, files: list[RemoteFile]) -> Path:
        return self.root


class _Record:
    """Which files were found to be what the hub says, by size and time of change: a hash is taken once."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        try:
            table = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            table = {}
        self._table: dict[str, Any] = table if isinstance(table, dict) else {}

    def has(self, key: str, file: Path) -> bool:
        with self._lock:
            return bool(self._table.get(key) == _stamp(file))

    def add(self, key: str, file: Path) -> None:
        with self._lock:
            if self._table.get(key) != _stamp(file):
                self._table[key] = _stamp(file)
                _replace(self._path, partial(Path.write_text, data=json.dumps(self._table)))


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns]


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    """Put something in the place of `path` at once, whoever else does the same."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.unlink(missing_ok=True)
    make(temporary)
    temporary.replace(path)


def _part_bytes(targets: Iterator[Path]) -> int:
    parts = [target.with_name(target.name + PART) for target in targets]
    return sum(part.stat().st_size for part in parts if part.exists())
