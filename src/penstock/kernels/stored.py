"""A matrix that still lies in files: whoever packs it reads it as it goes, so that no copy of it is in between."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penstock.errors import ModelError

_INT = ctypes.c_int64


class Rows(ctypes.Structure):
    """penstock_rows of kernels/cpu/pack.cpp."""

    _fields_ = (("memory", ctypes.c_void_p), ("file", _INT), ("start", _INT), ("count", _INT))


@dataclass(frozen=True)
class Part:
    """Rows of a matrix that lie together in a file, from the byte `start` on."""

    file: Path
    start: int
    rows: int


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [out, in] of some parts, one after the other. whole: reads it, for those who cannot read it in pieces.

    Beside that it says of itself what a tensor says.
    """

    parts: tuple[Part, ...]
    columns: int
    dtype: torch.dtype
    whole: Callable[[StoredMatrix], Tensor]

    device = torch.device("cpu")
    is_cuda = False

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.rows for part in self.parts), self.columns

    def split(self, rows: int) -> tuple[StoredMatrix, ...]:
        """As a tensor's: matrices of so many rows each. Of one part only."""
        (part,) = self.parts
        size = rows * self.columns * self.dtype.itemsize
        return tuple(
            StoredMatrix((Part(part.file, part.start + i * size, rows),), self.columns, self.dtype, self.whole)
            for i in range(part.rows // rows)
        )


Matrix = Tensor | StoredMatrix


def whole(matrix: Matrix) -> Tensor:
    """A matrix in memory."""
    return matrix.whole(matrix) if isinstance(matrix, StoredMatrix) else matrix


@contextlib.contextmanager
def opened(matrix: Matrix) -> Iterator[ctypes.Array[Rows]]:
    """The rows of a matrix as the packing kernels take them, while they may be read. Raises ModelError."""
    if isinstance(matrix, Tensor):
        rows = matrix.contiguous()
        yield (Rows * 1)(Rows(rows.data_ptr(), 0, 0, len(rows)))
        return
    size = matrix.columns * matrix.dtype.itemsize
    with contextlib.ExitStack() as files:
        found = []
        for part in matrix.parts:
            try:
                file = files.enter_context(part.file.open("rb", buffering=0))
            except OSError as error:
                raise unreadable(part.file, error.errno or 0) from None
            if hasattr(os, "posix_fadvise"):  # what is not in memory yet is fetched while the first rows are packed
                os.posix_fadvise(file.fileno(), part.start, part.rows * size, os.POSIX_FADV_WILLNEED)
            found.append(Rows(None, file.fileno(), part.start, part.rows))
        yield (Rows * len(found))(*found)


def check(matrix: Matrix, failed: int) -> None:
    """Raise what a packing kernel says of reading: 0, an errno, or -1 for a file that ends early. Raises ModelError."""
    if failed and isinstance(matrix, StoredMatrix):
        raise ends_early(matrix.parts[0].file) if failed < 0 else unreadable(matrix.parts[0].file, failed)


def ends_early(file: Path) -> ModelError:
    return ModelError(f"{file.name} ends early", "the file is truncated", "download the model again")


def unreadable(file: Path, number: int) -> ModelError:
    return ModelError(f"cannot read {file.name}", os.strerror(number) if number else "", "check the file's permissions")
