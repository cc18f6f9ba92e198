"""A file with a model's weights as they lie in memory: packed, arranged, quantized. The next start maps it.

The weights are dataclasses of ours over tensors. The file says in JSON how they hang together, then come the tensors:

    magic, 16 bytes | length of the JSON, u64 little-endian | its SHA-256 | JSON | zeros | tensors, each at its offset

A mapped file takes no memory that its neighbours need as well: every process that maps it shares the system's cache of
it, and a start waits for nothing but a table of pages.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

MAGIC = b"penstock packed\n"
_HEAD = struct.Struct("<16sQ32s")
_PAGE, _LINE = 4096, 64  # where large tensors and where small ones begin
_LARGE = 2**20
_PIECE = 2**22  # bytes that are written at a time; whole large pages of the system's cache
_STRETCH = 2**26  # bytes whose pages are looked up while this process does nothing else
_LONGEST = 2**26  # bytes of a description
_POPULATE_READ = 22  # MADV_POPULATE_READ of Linux, which Python's mmap does not name
_OURS = ("penstock.models.", "penstock.formats.", "penstock.kernels.")
_DTYPES = {str(d).removeprefix("torch."): d for d in (
    torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool,
)}  # fmt: skip


class NotKeepable(TypeError):
    """Something in the weights that a file cannot say: a library's own layout, a table on another device."""


class Unreadable(Exception):
    """A file that is no copy, or one that another build of Penstock made."""


class Plan:
    """What a file will hold. Made before a byte is written; `size` is that of the whole file."""

    def __init__(self, weights: object, remark: str) -> None:
        """weights: dataclasses, lists, tuples, numbers and tensors. remark: kept beside them. Raises NotKeepable."""
        self._places: dict[tuple[Any, ...], int] = {}  # a tensor that is there twice is kept once
        self.tensors: list[tuple[Tensor, int]] = []
        self._end = 0
        tree = self._told(weights)
        described = [[_name(t.dtype), list(t.shape), offset] for t, offset in self.tensors]
        text = json.dumps({"remark": remark, "tree": tree, "tensors": described, "size": self._end}).encode()
        head = _HEAD.pack(MAGIC, len(text), hashlib.sha256(text).digest()) + text
        self.start = _up(len(head), _PAGE)
        self.head = head.ljust(self.start, b"\0")
        self.size = self.start + self._end

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """The content, in pieces of a few MiB: the offset of each in the file, and its bytes."""
        yield 0, memoryview(self.head)
        for tensor, offset in self.tensors:
            data = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            at = self.start + offset
            while data:  # to the next multiple of a piece: what the cache holds in large pages can be mapped in them
                n = _PIECE - at % _PIECE
                yield at, data[:n]
                at, data = at + n, data[n:]

    def _told(self, x: object) -> Any:
        if x is None or isinstance(x, (bool, int, float, str)):
            return x
        if isinstance(x, Tensor):
            return {"tensor": self._place(x)}
        if isinstance(x, list):
            return {"list": [self._told(item) for item in x]}
        if isinstance(x, tuple):
            return {"tuple": [self._told(item) for item in x]}
        kind = type(x)
        if is_dataclass(x) and kind.__module__.startswith(_OURS):
            told = {f.name: self._told(getattr(x, f.name)) for f in fields(x) if f.init}
            return {"is": f"{kind.__module__}:{kind.__qualname__}", "of": told}
        raise NotKeepable(f"{kind.__module__}.{kind.__qualname__}")

    def _place(self, tensor: Tensor) -> int:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise NotKeepable(f"a tensor on {tensor.device} of layout {tensor.layout}")
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self._places:
            offset = _up(self._end, _PAGE if tensor.nbytes >= _LARGE else _LINE)
            self._places[key] = len(self.tensors)
            self.tensors.append((tensor, offset))
            self._end = offset + tensor.nbytes
        return self._places[key]


def read(fd: int) -> tuple[Any, str]:
    """The weights in an open file, over a private mapping of it, and the remark. Raises Unreadable, OSError.

    Of what the file names only dataclasses of Penstock's own are made, and only tensors inside the file.
    """
    size = os.fstat(fd).st_size
    head = os.pread(fd, _HEAD.size, 0)
    if len(head) != _HEAD.size or not head.startswith(MAGIC):
        raise Unreadable("it does not begin as a copy does")
    _, length, digest = _HEAD.unpack(head)
    if length > min(size, _LONGEST):
        raise Unreadable("it is cut short")
    text = os.pread(fd, length, _HEAD.size)
    if hashlib.sha256(text).digest() != digest:
        raise Unreadable("its description is not what was written")
    start = _up(_HEAD.size + length, _PAGE)
    try:
        told = json.loads(text)
        remark, described, end = told["remark"], told["tensors"], told["size"]
        if start + end != size or not isinstance(remark, str):
            raise Unreadable("it is cut short")
        memory = torch.frombuffer(_mapped(fd, size), dtype=torch.uint8)[start:]
        tensors = [_tensor(memory, *entry) for entry in described]
        return _made(told["tree"], tensors), remark
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, RuntimeError) as error:
        raise Unreadable(f"its description does not hold: {error}") from None


def _mapped(fd: int, size: int) -> mmap.mmap:
    """The file in memory, every page of it looked up at once instead of one by one while the first step waits."""
    pages = mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    try:
        for begin in range(0, size, _STRETCH):
            pages.madvise(_POPULATE_READ, begin, min(_STRETCH, size - begin))
    except OSError as error:
        if error.errno != errno.EINVAL:  # a page that cannot be read would end us with a signal later
            raise
        # else an older kernel: the pages come as they are touched
    return pages


def _tensor(memory: Tensor, dtype: str, shape: list[int], offset: int) -> Tensor:
    kind = _DTYPES[dtype]
    size = prod(shape) * kind.itemsize
    if offset < 0 or offset % _LINE or any(n < 0 for n in shape) or offset + size > len(memory):
        raise Unreadable("a tensor lies outside the file")
    return memory[offset : offset + size].view(kind).view(shape)


def _made(told: Any, tensors: list[Tensor]) -> Any:
    """The objects that a description tells."""
    if not isinstance(told, dict):
        return told
    if "tensor" in told:
        return tensors[told["tensor"]]
    if "list" in told:
        return [_made(item, tensors) for item in told["list"]]
    if "tuple" in told:
        return tuple(_made(item, tensors) for item in told["tuple"])
    module, _, name = told["is"].partition(":")
    kind = getattr(sys.modules[module], name) if module.startswith(_OURS) else None
    if not isinstance(kind, type) or not is_dataclass(kind):
        raise Unreadable(f"{told['is']} is none of our dataclasses")
    return kind(**{field: _made(value, tensors) for field, value in told["of"].items()})


def _name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise NotKeepable(str(dtype))
    return name


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
