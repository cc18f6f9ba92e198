"""What is staged: the files of a model folder, cut into pieces that can be copied and checked one by one."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

import msgspec

from penstock.errors import ModelError
from penstock.hub.download import ALLOW
from penstock.hub.fingerprint import fingerprint
from penstock.hub.folder import member

MIB = 2**20
CUTS = 128  # pieces of a model, about: small enough to measure several ways on them


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of one file. file: its index in the manifest."""

    file: int
    offset: int
    length: int


class Manifest(msgspec.Struct, frozen=True):
    """The files by name, where they lie and their bytes; key: the identity of the content."""

    key: str
    names: tuple[str, ...]
    sources: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)

    def pieces(self) -> list[Piece]:
        """The whole model, in order. The same for everybody who has the manifest."""
        step = max(MIB, -(-self.total // (CUTS * MIB)) * MIB)
        return [
            Piece(index, offset, min(step, size - offset))
            for index, size in enumerate(self.sizes)
            for offset in range(0, size, step)
        ]


def read_manifest(folder: Path) -> Manifest:
    """The files that a model needs: configuration, tokenizer, templates, safetensors or GGUF. Raises ModelError."""
    names = [
        name
        for name in sorted(os.listdir(folder))
        if any(fnmatch.fnmatch(name, pattern) for pattern in (*ALLOW, "*.gguf")) and (folder / name).is_file()
    ]
    sources = [member(folder, name) for name in names]
    if not any(name.endswith((".safetensors", ".gguf")) for name in names):
        raise ModelError(f"{folder} has no weights to stage.", "", "Give a folder with *.safetensors.")
    return Manifest(
        key=fingerprint(folder)[:24],
        names=tuple(names),
        sources=tuple(map(str, sources)),
        sizes=tuple(source.stat().st_size for source in sources),
    )
