"""Files of torch.save as lists of tensors: the zip archive of torch 1.6 and later, and the older stream of pickles."""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

from penstock.hub import torch_pickle
from penstock.hub.torch_pickle import STORAGES, NotTensors, Storage, TensorView

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_DESCRIPTION = 256 * 1024 * 1024  # bytes of data.pkl


@dataclass(frozen=True)
class BinTensor:
    """One tensor of the file. start: absolute byte of its first element; stride: in elements, as shape."""

    name: str
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize

    @property
    def span(self) -> int:
        """Elements from the first to the last, both included."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True)) if self.nbytes else 0

    @property
    def contiguous(self) -> bool:
        step = 1
        for n, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if n != 1 and stride != step:
                return False
            step *= n
        return True


def read_tensors(file: BinaryIO, size: int) -> list[BinTensor]:
    """The tensors of a file of so many bytes, sorted by name. Raises NotTensors, or anything for a damaged file."""
    if zipfile.is_zipfile(file):
        value, places = _read_archive(file)
    else:
        value, places = _read_stream(file)
    for key in ("state_dict", "model"):  # training frameworks wrap the tensors
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    views = {name: view for name, view in value.items() if isinstance(view, TensorView)} if type(value) is dict else {}
    if not views or not all(isinstance(name, str) for name in views):
        raise NotTensors("it holds no tensors by name")
    return [_placed(name, views[name], places, size) for name in sorted(views)]


def _placed(name: str, view: TensorView, places: dict[str, tuple[int, int]], size: int) -> BinTensor:
    """The tensor at its place, checked against its storage and the file."""
    itemsize, dtype = STORAGES[view.storage.kind]
    start, length = places[view.storage.key]
    tensor = BinTensor(name, dtype, itemsize, view.shape, view.stride, start + view.offset * itemsize)
    within = min(view.storage.elements * itemsize, length)
    if (view.offset + tensor.span) * itemsize > within or start + within > size:
        raise NotTensors(f"the tensor {name[:80]!r} is larger than what holds it")
    return tensor


def _read_archive(file: BinaryIO) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The description in a zip archive, and (first byte, bytes) of each storage in it."""
    archive = zipfile.ZipFile(file)
    infos = {info.filename: info for info in archive.infolist()}
    described = [name for name in infos if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(described) != 1 or any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
        raise NotTensors("it is an archive of another kind")
    prefix = described[0].removesuffix("data.pkl")
    if infos[described[0]].file_size > _MAX_DESCRIPTION:
        raise NotTensors("its description is longer than any honest one")
    order = infos.get(f"{prefix}byteorder")
    if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
        raise NotTensors("its numbers are big-endian")
    with archive.open(described[0]) as stream:
        value = torch_pickle.read(stream)  # type: ignore[arg-type]
    data = f"{prefix}data/"
    places = {
        name.removeprefix(data): (_first_byte(file, info), info.file_size)
        for name, info in infos.items()
        if name.startswith(data)
    }
    return value, places


def _first_byte(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where an entry's content begins, behind the header that stands before it."""
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) != 30 or header[:4] != b"PK\3\4":
        raise NotTensors("its archive is damaged")
    name, extra = struct.unpack("<HH", header[26:30])
    return info.header_offset + 30 + int(name) + int(extra)


def _read_stream(file: BinaryIO) -> tuple[Any, dict[str, tuple[int, int]]]:
    """The description in the older format: pickles one after the other, then the storages as they are listed."""
    file.seek(0)
    if torch_pickle.read(file) != _LEGACY_MAGIC:
        raise NotTensors("it is not a file of torch.save")
    version, system = torch_pickle.read(file), torch_pickle.read(file)
    if version != 1001 or not isinstance(system, dict) or not system.get("little_endian"):
        raise NotTensors("it is of an unknown version, or big-endian")
    value, keys = torch_pickle.read(file), torch_pickle.read(file)
    sizes = {storage.key: STORAGES[storage.kind][0] for storage in _storages(value)}
    places: dict[str, tuple[int, int]] = {}
    for key in keys:
        elements = int.from_bytes(file.read(8), "little")
        places[key] = (file.tell(), elements * sizes[key])
        file.seek(elements * sizes[key], 1)
    return value, places


def _storages(value: Any) -> list[Storage]:
    """Every storage that a description uses."""
    found: list[Storage] = []
    todo, seen = [value], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:  # a list may hold itself
            continue
        seen.add(id(item))
        if isinstance(item, TensorView):
            found.append(item.storage)
        elif isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list | tuple):
            todo.extend(item)
    return found
