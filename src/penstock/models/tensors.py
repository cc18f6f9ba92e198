"""Single tensors of a checkpoint, read and checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from penstock.devices.cpu import zeros_on_demand
from penstock.errors import ModelError
from penstock.hub.checkpoint import TensorEntry
from penstock.kernels.gguf_blocks import BLOCKS, dequantize
from penstock.kernels.stored import Matrix, Part, StoredMatrix, ends_early, unreadable

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 2**17  # weights that are dequantized at a time
_CONVERTED = 2**22  # numbers that are converted at a time
_LARGE = 2**22  # bytes of a tensor that is worth pages of 2 MiB
_PIECE = 2**23  # bytes that one thread reads at a time
_PINNED = 2**26  # bytes on their way to a device
CPU = torch.device("cpu")


class TensorReader:
    """Reads single tensors of a checkpoint onto a device, checking name, type and shape.

    The file is read, not mapped: a file cut short under our feet is then an error and not a signal.
    """

    def __init__(self, entries: dict[str, TensorEntry], dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.entries, self.dtype, self.device = entries, dtype, device
        self._through = None if device.type == "cpu" else PinnedBuffer()

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def __call__(
        self, name: str, shape: tuple[int, ...], out: Tensor | None = None, part: tuple[int, int] | None = None
    ) -> Tensor:
        """The tensor in the working type, in `out` where it is given (contiguous, of that shape and type).

        part: (i, n): the tensor is one of n along a first axis, the i-th is read. Raises ModelError when it is absent,
        misshapen or cut short.
        """
        entry = self._entry(name, shape if part is None else (part[1], *shape))
        out = fresh(shape, self.dtype, self.device) if out is None else out
        index = 0 if part is None else part[0]
        if entry.dtype in BLOCKS:
            _dequantize_into(entry, index, out.view(-1))
        elif entry.dtype in _DTYPES:
            self._read_numbers(entry, _DTYPES[entry.dtype], index, out.view(-1))
        else:
            raise ModelError(f"{entry.file.name}: tensor {name!r} has type {entry.dtype}, which cannot be computed in")
        if entry.interleaved:  # [heads, dim/2, 2, ...] on disk, [heads, 2, dim/2, ...] for the decoder
            out.copy_(out.view(entry.interleaved, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape))
        return out

    def matrix(self, parts: Sequence[tuple[str, int]], columns: int) -> Matrix:
        """Tensors of so many rows each, stacked: as they lie in their files where the numbers are stored just so, else
        read. Raises ModelError as above."""
        entries = [self._entry(name, (rows, columns)) for name, rows in parts]
        if self.device.type == "cpu" and all(
            _DTYPES.get(e.dtype) == self.dtype and not e.interleaved and not e.shift for e in entries
        ):
            stored = tuple(Part(e.file, e.start, e.shape[0]) for e in entries)
            return StoredMatrix(stored, columns, self.dtype, _read_whole)
        return stacked(self, parts, columns)

    def _entry(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(
                f"the checkpoint has no tensor {name!r}", "it does not fit its config.json", "download the model again"
            )
        if entry.shape != shape:
            raise ModelError(
                f"{entry.file.name}: tensor {name!r} has shape {list(entry.shape)}",
                f"config.json asks for {list(shape)}",
                "download the model again, config.json and weights from one revision",
            )
        return entry

    def _read_numbers(self, entry: TensorEntry, stored: torch.dtype, index: int, out: Tensor) -> None:
        """Fill a flat tensor; where the file has another type, so much at a time that what is between stays small.

        index: of a part as large as `out`.
        """
        read = _read_into if self._through is None else self._through.read_into
        start = entry.start + index * len(out) * stored.itemsize
        if stored == self.dtype:
            read(entry.file, start, out.view(torch.uint8))
        else:
            raw = torch.empty(min(_CONVERTED, len(out)), dtype=stored, device=self.device)
            for i, piece in enumerate(out.split(_CONVERTED)):
                read(entry.file, start + i * raw.nbytes, raw[: len(piece)].view(torch.uint8))
                piece.copy_(raw[: len(piece)])
        if entry.shift:
            out += entry.shift


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    """Memory for a tensor; for a large one of a processor in large pages, which the system gives many times faster."""
    if device.type == "cpu" and prod(shape) * dtype.itemsize >= _LARGE:
        return zeros_on_demand(shape, dtype, huge=True)
    return torch.empty(shape, dtype=dtype, device=device)


def stacked(read: TensorReader | RandomReader, parts: Sequence[tuple[str, int]], columns: int) -> Tensor:
    """Tensors [rows, columns] one after the other, in memory."""
    out = fresh((sum(rows for _, rows in parts), columns), read.dtype, read.device)
    for (name, rows), slot in zip(parts, out.split([rows for _, rows in parts]), strict=True):
        read(name, (rows, columns), slot)
    return out


def _read_whole(matrix: StoredMatrix) -> Tensor:
    out = fresh(matrix.shape, matrix.dtype)
    for part, slot in zip(matrix.parts, out.split([part.rows for part in matrix.parts]), strict=True):
        _read_into(part.file, part.start, slot.view(-1).view(torch.uint8))
    return out


def _dequantize_into(entry: TensorEntry, index: int, out: Tensor) -> None:
    """Fill a flat tensor from quantized blocks, so many at a time that what is between them stays in the cache.

    index: of a part as large as `out`.
    """
    elements, size = BLOCKS[entry.dtype]
    start = entry.start + index * len(out) // elements * size
    raw = torch.empty((min(_CHUNK, len(out)) // elements, size), dtype=torch.uint8)
    for i, part in enumerate(out.split(len(raw) * elements)):
        blocks = raw[: len(part) // elements]
        _read_into(entry.file, start + i * raw.nbytes, blocks.view(-1))
        part.copy_(dequantize(entry.dtype, blocks).view(-1))
        if entry.shift:
            part += entry.shift


class RandomReader:
    """Stands in for a TensorReader where there is no checkpoint: every tensor is random, every norm's weight is one.

    The numbers repeat after a prime number of them, so that no two rows of a matrix are alike and a gigabyte takes a
    moment.
    """

    _PERIOD = 999_983
    _SPREAD = 0.02

    def __init__(self, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.dtype, self.device = dtype, device
        generator = torch.Generator().manual_seed(0)
        self._numbers = (torch.randn(self._PERIOD, generator=generator) * self._SPREAD).to(device, dtype)

    def __contains__(self, name: str) -> bool:
        return False

    def __call__(
        self, name: str, shape: tuple[int, ...], out: Tensor | None = None, part: tuple[int, int] | None = None
    ) -> Tensor:
        """A tensor of that shape, in `out` where it is given."""
        out = fresh(shape, self.dtype, self.device) if out is None else out
        if len(shape) == 1:
            return out.fill_(0.0 if name.endswith(".bias") else 1.0)
        for piece in out.view(-1).split(self._PERIOD):
            piece.copy_(self._numbers[: len(piece)])
        return out

    def matrix(self, parts: Sequence[tuple[str, int]], columns: int) -> Matrix:
        """Tensors of so many rows each, stacked."""
        return stacked(self, parts, columns)


class PinnedBuffer:
    """Memory that a device copies from at its full speed; a tensor goes through it in parts."""

    def __init__(self, size: int = _PINNED) -> None:
        self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())

    def read_into(self, path: Path, offset: int, out: Tensor) -> None:
        """Fill a flat tensor of bytes from a file. Raises ModelError as `_read_into`."""
        done = 0
        for part in out.split(len(self._buffer)):
            piece = self._buffer[: len(part)]
            _read_into(path, offset + done, piece)
            part.copy_(piece)  # waits: the buffer is filled again next
            done += len(part)


def _read_into(path: Path, offset: int, buffer: Tensor) -> None:
    """Fill a byte tensor from a file, a large one by as many threads as compute: the system copies from its cache, and
    gives fresh pages, at the speed of one core. Raises ModelError when the file ends early or cannot be read."""
    pieces = memoryview(buffer.numpy())  # type: ignore[arg-type]
    starts = range(0, len(pieces), _PIECE)
    try:
        with open(path, "rb", buffering=0) as file:

            def read(start: int) -> None:
                _fill(file.fileno(), offset + start, pieces[start : start + _PIECE], path)

            if len(starts) == 1 or torch.get_num_threads() == 1:
                for start in starts:
                    read(start)
            else:
                with ThreadPoolExecutor(min(len(starts), torch.get_num_threads())) as pool:
                    list(pool.map(read, starts))
    except OSError as error:
        raise unreadable(path, error.errno or 0) from None


def _fill(fd: int, offset: int, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        n = os.preadv(fd, [view[done:]], offset + done)
        if n == 0:
            raise ends_early(path)
        done += n
