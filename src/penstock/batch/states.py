"""Hidden states on their way to disk: two files that only grow, so that a run can be killed and go on.

`NAME.part` holds the numbers as they came, `NAME.part.jsonl` a line for each finished row that says where its numbers
are, with a checksum. What was not finished is done again; what is damaged, too. Memory holds one number a row.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from penstock.batch.embed import Part
from penstock.batch.lines import lines_of, open_locked, write_all
from penstock.errors import PartialResults


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive positions of a row: [layers, tokens, width] float32 from byte `start` on."""

    start: int
    tokens: int
    crc: int


class StateRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """One finished row. number: its place in the input; width: of a state. A row with an error has no chunks."""

    number: int
    id: int | str
    width: int = 0
    chunks: list[Chunk] = []
    token_ids: list[int] = []
    error: str | None = None

    @property
    def tokens(self) -> int:
        """Positions whose states are there."""
        return sum(chunk.tokens for chunk in self.chunks)


_ROW = msgspec.json.Decoder(StateRow)


class StateStore:
    """The two files of one run. `done` are the numbers of the rows without errors that are there."""

    def __init__(self, output: Path, layers: int, *, overwrite: bool) -> None:
        """layers: how many. Raises EnvironmentFault when the files cannot be opened, or another run has them."""
        self.data_path = output.with_name(output.name + ".part")
        self.rows_path = output.with_name(output.name + ".part.jsonl")
        self.layers = layers
        self._data, self._rows = open_locked(self.data_path), open_locked(self.rows_path)
        self._open: dict[int, list[Chunk]] = {}  # of rows that are not finished
        self._index: dict[int, int] = {}  # number of a row: where its line begins
        self.done: set[int] = set()
        self.errors: set[int] = set()
        if overwrite:
            os.ftruncate(self._data, 0)
            os.ftruncate(self._rows, 0)
        self._resume()

    def write(self, parts: list[Part], width: int, keep_tokens: bool) -> None:
        """Append what a step made. width: of a state; keep_tokens: note the ids of the prompts as well.

        Raises PartialResults when the disk takes no more; finished rows stay.
        """
        try:
            for part in parts:
                if part.states:
                    self._open.setdefault(part.number, []).append(self._chunk(part.states, width))
                if part.last:
                    self._finish(part, width, keep_tokens)
        except OSError as error:
            raise PartialResults(
                f"The file {self.data_path} cannot be written: {error.strerror}.",
                f"{len(self.done):,} rows are done and stay.",
                "Free some space and run the same command again: it goes on where this run stopped.",
            ) from error

    def rows(self) -> Iterator[StateRow]:
        """Every row in the order of the input."""
        for number in sorted(self._index):
            yield self._row_at(self._index[number])

    def read(self, row: StateRow, chunk: Chunk, layer: int) -> bytes:
        """The states of one layer (its place among those asked for) in a chunk of a row: [tokens, width] float32."""
        size = 4 * chunk.tokens * row.width
        return os.pread(self._data, size, chunk.start + layer * size)

    def close(self) -> None:
        """Close both files."""
        os.close(self._data)
        os.close(self._rows)

    def remove(self) -> None:
        """Delete both files: their content is elsewhere."""
        self.rows_path.unlink()
        self.data_path.unlink()

    def _chunk(self, states: bytes, width: int) -> Chunk:
        start = os.lseek(self._data, 0, os.SEEK_END)
        write_all(self._data, states)
        return Chunk(start, len(states) // (4 * self.layers * width), zlib.crc32(states))

    def _finish(self, part: Part, width: int, keep_tokens: bool) -> None:
        chunks = self._open.pop(part.number, [])
        row_id = part.number if part.row.id is None else part.row.id
        if part.error is None:
            row = StateRow(part.number, row_id, width, chunks, part.token_ids if keep_tokens else [])
        else:
            row = StateRow(part.number, row_id, error=part.error)
        self._index[row.number] = os.lseek(self._rows, 0, os.SEEK_END)
        write_all(self._rows, msgspec.json.encode(row) + b"\n")
        (self.done if row.error is None else self.errors).add(row.number)

    def _resume(self) -> None:
        """Take note of what earlier runs left; a torn line at the end is cut off."""
        end = 0
        for start, line in lines_of(self._rows):
            try:
                row = _ROW.decode(line) if line.endswith(b"\n") else None
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                row = None
            if row is None:
                break
            end = start + len(line)
            if row.error is None and self._whole(row):
                self._index[row.number] = start
                self.done.add(row.number)
        os.ftruncate(self._rows, end)

    def _whole(self, row: StateRow) -> bool:
        """Whether a row's numbers are what they were; after a loss of power the file may lack them."""
        for chunk in row.chunks:
            size = 4 * self.layers * chunk.tokens * row.width
            if zlib.crc32(os.pread(self._data, size, chunk.start)) != chunk.crc:
                return False
        return True

    def _row_at(self, start: int) -> StateRow:
        with open(os.dup(self._rows), "rb") as file:
            file.seek(start)
            return _ROW.decode(file.readline())
