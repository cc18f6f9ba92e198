"""Single tensors of a checkpoint, read and checked."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from penstock.errors import ModelError
from penstock.hub.checkpoint import TensorEntry
from penstock.kernels.gguf_blocks import BLOCKS, dequantize

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 2**17  # weights that are dequantized at a time
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
        stored_shape = shape if part is None else (part[1], *shape)
        entry = self.entries.get(name)
        if entry is None:
            raise ModelError(
                f"the checkpoint has no tensor {name!r}", "it does not fit its config.json", "download the model again"
            )
        if entry.shape != stored_shape:
            raise ModelError(
                f"{entry.file.name}: tensor {name!r} has shape {list(entry.shape)}",
                f"config.json asks for {list(stored_shape)}",
                "download the model again, config.json and weights from one revision",
            )
        out = torch.empty(shape, dtype=self.dtype, device=self.device) if out is None else out
        index = 0 if part is None else part[0]
        if entry.dtype in BLOCKS:
            _dequantize_into(entry, index, out.view(-1))
        elif entry.dtype in _DTYPES:
            stored = _DTYPES[entry.dtype]
            raw = out if stored == self.dtype else torch.empty(shape, dtype=stored, device=self.device)
            read = _read_into if self._through is None else self._through.read_into
            read(entry.file, entry.start + index * raw.nbytes, raw.view(-1).view(torch.uint8))
            if entry.shift:
                raw += entry.shift
            if raw is not out:
                out.copy_(raw)
        else:
            raise ModelError(f"{entry.file.name}: tensor {name!r} has type {entry.dtype}, which cannot be computed in")
        if entry.interleaved:  # [heads, dim/2, 2, ...] on disk, [heads, 2, dim/2, ...] for the decoder
            out.copy_(out.view(entry.interleaved, -1, 2, *shape[1:]).transpose(1, 2).reshape(shape))
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
        out = torch.empty(shape, dtype=self.dtype, device=self.device) if out is None else out
        if len(shape) == 1:
            return out.fill_(0.0 if name.endswith(".bias") else 1.0)
        for piece in out.view(-1).split(self._PERIOD):
            piece.copy_(self._numbers[: len(piece)])
        return out


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
                _fill(file.fileno(), offset + start, pieces[start : start + _PIECE], path.name)

            if len(starts) == 1 or torch.get_num_threads() == 1:
                for start in starts:
                    read(start)
            else:
                with ThreadPoolExecutor(min(len(starts), torch.get_num_threads())) as pool:
                    list(pool.map(read, starts))
    except OSError as error:
        raise ModelError(f"cannot read {path.name}", error.strerror or "", "check the file's permissions") from None


def _fill(fd: int, offset: int, view: memoryview, name: str) -> None:
    done = 0
    while done < len(view):
        n = os.preadv(fd, [view[done:]], offset + done)
        if n == 0:
            raise ModelError(f"{name} ends early", "the file is truncated", "download the model again")
        done += n
