"""The header of a GGUF file: its metadata, and where its tensors lie, every count and offset checked before use.

All sums are done with Python's unbounded ints, and nothing is allocated for a count that the rest of the file could
not hold. Layout: the GGUF specification of the ggml project, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from penstock.errors import ModelError
from penstock.hub.folder import damaged, reason
from penstock.hub.gguf.find import PART

Value = int | float | bool | str | list[str] | npt.NDArray[np.generic]

MAGIC = b"GGUF"
MAX_HEADER = 2**28  # bytes before the tensors; the largest honest ones (vocabularies) have some 20 MiB
MAX_KEYS, MAX_TENSORS = 2**16, 2**16
MAX_STRINGS = 2**22  # in one file: tokens and merges
MAX_DIMS = 4
_AGAIN = "Download the file again, or take the model's safetensors repository."

# elements and bytes of one block, by the number that GGUF has for the type
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip
_OTHER_TYPES = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor on disk. kind: F32, Q4_K ...; shape: outermost first, as torch has it; start, end: absolute bytes."""

    name: str
    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class GgufModel:
    """One model, of one file or several. metadata: the first file's; files: in the order of their numbers."""

    files: tuple[Path, ...]
    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]

    @property
    def file(self) -> Path:
        """The one to name in messages."""
        return self.files[0]


def read_gguf(path: Path) -> GgufModel:
    """The model that `path` is, or is a part of (`x-00001-of-00003.gguf`). Raises ModelError naming file and reason."""
    files = parts_of(path)
    metadata: dict[str, Value] = {}
    tensors: dict[str, GgufTensor] = {}
    for number, file in enumerate(files):
        found, own = _read_file(file)
        if len(files) > 1 and (found.get("split.no"), found.get("split.count")) != (number, len(files)):
            raise damaged(file, f"Its name says part {number + 1} of {len(files)}, its content does not.", _AGAIN)
        if number == 0:
            metadata = found
        for tensor in own:
            if tensor.name in tensors:
                raise damaged(file, f"The tensor {tensor.name!r} is in two parts of the model.", _AGAIN)
            tensors[tensor.name] = tensor
    split = metadata.get("split.count", 0)
    if len(files) == 1 and isinstance(split, int) and split > 1:
        raise damaged(files[0], f"It is one of {split} parts, but its name does not say which.", _AGAIN)
    return GgufModel(files, metadata, tensors)


def parts_of(path: Path) -> tuple[Path, ...]:
    """All files of the model, in order; a single file is its own only part. Raises ModelError where one is missing."""
    match = PART.fullmatch(path.name)
    if match is None:
        return (_regular(path),)
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count <= 1000:
        raise damaged(path, "Its name gives an impossible part number.", _AGAIN)
    names = [f"{match['stem']}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]
    return tuple(_regular(path.with_name(name)) for name in names)


def _regular(path: Path) -> Path:
    try:
        if stat.S_ISREG(path.stat().st_mode):
            return path
        raise damaged(path, "It is not a regular file.", "Give the GGUF file itself.")
    except FileNotFoundError:
        raise damaged(path, "It is missing.", "Download all parts of the model into one folder.") from None
    except OSError as error:
        raise damaged(path, f"It cannot be reached: {reason(error)}.") from None


def _read_file(path: Path) -> tuple[dict[str, Value], list[GgufTensor]]:
    try:
        with path.open("rb") as file:
            return _Header(path, file).read()
    except OSError as error:
        raise damaged(path, f"It cannot be read: {reason(error)}.") from None


class _Header:
    """The cursor over one file's header."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = os.fstat(file.fileno()).st_size
        self._limit = min(self._size, MAX_HEADER)
        self._at = self._strings = 0

    def read(self) -> tuple[dict[str, Value], list[GgufTensor]]:
        if self._size < 24:
            raise self._bad(f"It has {self._size} bytes, fewer than any GGUF file.")
        magic = self._take(4)
        if magic != MAGIC:
            raise self._bad("It does not begin as a GGUF file does.")
        version = self._u32()
        if version not in (2, 3):
            endian = version and not version & 0xFFFF
            raise self._bad(f"It is of version {version}." if not endian else "It is big-endian.")
        tensors = self._count(MAX_TENSORS, 24, "tensors")
        keys = self._count(MAX_KEYS, 12, "keys")
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            key = self._text(2**16)
            if key in metadata:
                raise self._bad(f"The key {key[:80]!r} stands twice.")
            metadata[key] = self._value(self._u32(), key)
        specs = [self._spec() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 8 <= alignment <= 2**16 or alignment & (alignment - 1):
            raise self._bad(f"Its alignment {str(alignment)[:20]} is not a power of two from 8 to 65,536.")
        return metadata, self._lay_out(specs, alignment)

    def _lay_out(self, specs: list[tuple[str, str, tuple[int, ...], int, int]], alignment: int) -> list[GgufTensor]:
        """Give every tensor its place, and check that they neither overlap nor leave the file."""
        base = -(-self._at // alignment) * alignment
        tensors, seen, free = [], set(), base
        for name, kind, shape, offset, size in sorted(specs, key=lambda spec: spec[3]):
            if name in seen:
                raise self._bad(f"The tensor {name!r} stands twice.")
            seen.add(name)
            start = base + offset
            if offset % alignment or start < free:
                raise self._bad(f"Tensor {name!r} lies at the impossible offset {offset:,}.")
            free = start + size
            if free > self._size:
                raise self._bad(f"It was cut short: tensor {name!r} ends at byte {free:,}, the file at {self._size:,}.")
            tensors.append(GgufTensor(name, self._path, kind, shape, start, free))
        return tensors

    def _spec(self) -> tuple[str, str, tuple[int, ...], int, int]:
        """What the header says of one tensor: name, kind, shape, offset and bytes."""
        name = self._text(256)
        dims = self._u32()
        if not name or not name.isprintable() or not 1 <= dims <= MAX_DIMS:
            raise self._bad(f"Tensor {name[:80]!r} has the impossible number of {dims} dimensions.")
        sizes = struct.unpack(f"<{dims}Q", self._take(8 * dims))
        number, offset = self._u32(), self._u64()
        if number not in _TYPES:
            raise ModelError(
                f"The GGUF file {self._path} cannot be used.",
                f"Tensor {name!r} is of type {_OTHER_TYPES.get(number, number)}, which is not supported.",
                f"Take a file in one of {', '.join(kind for kind, _, _ in _TYPES.values())}.",
            )
        kind, elements, block = _TYPES[number]
        total = prod(sizes)
        if not total or sizes[0] % elements or total >= 2**62:
            raise self._bad(f"Tensor {name!r} of type {kind} has the impossible shape {list(sizes)}.")
        return name, kind, tuple(reversed(sizes)), offset, total // elements * block

    def _value(self, kind: int, key: str) -> Value:
        if kind in _NUMBERS:
            dtype = np.dtype(_NUMBERS[kind])
            number: int | float = np.frombuffer(self._take(dtype.itemsize), dtype)[0].item()
            return number
        if kind == _BOOL:
            return self._take(1) != b"\0"
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise self._bad(f"The key {key[:80]!r} has a value of the unknown type {kind}.")
        element = self._u32()
        if element in _NUMBERS or element == _BOOL:
            dtype = np.dtype(_NUMBERS.get(element, "?"))
            count = self._count(MAX_HEADER, dtype.itemsize, "numbers")
            raw = np.frombuffer(self._take(count * dtype.itemsize), np.uint8)
            return raw != 0 if element == _BOOL else raw.view(dtype)
        if element != _STRING:
            raise self._bad(f"The key {key[:80]!r} has an array of type {element}.")
        count = self._count(MAX_STRINGS - self._strings, 8, "strings")
        self._strings += count
        return [self._text() for _ in range(count)]

    def _count(self, most: int, least_bytes: int, name: str) -> int:
        """A count of things that take at least so many bytes each."""
        count = self._u64()
        if count > most or count * least_bytes > self._limit - self._at:
            raise self._bad(f"It claims {count:,} {name}, more than it can hold.")
        return count

    def _text(self, most: int = MAX_HEADER) -> str:
        length = self._u64()
        if length > most:
            raise self._bad(f"A text in it claims {length:,} bytes.")
        raw = self._take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._bad(f"A text before byte {self._at:,} is not UTF-8.") from None

    def _u32(self) -> int:
        return int.from_bytes(self._take(4), "little")

    def _u64(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def _take(self, count: int) -> bytes:
        if count > self._limit - self._at:
            if self._limit < self._size:
                raise self._bad(f"Its header is longer than {MAX_HEADER:,} bytes.")
            raise self._bad(f"It was cut short: {count:,} bytes are missing at byte {self._at:,}.")
        self._at += count
        raw = self._file.read(count)
        if len(raw) != count:
            raise self._bad("It became shorter while it was read.")
        return raw

    def _bad(self, why: str) -> ModelError:
        return damaged(self._path, why, _AGAIN)
