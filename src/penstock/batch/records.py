"""What an input is made of: records, numbered from 1, and the lines that most of them are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, Literal, Protocol

from penstock.errors import EnvironmentFault

Kind = Literal["txt", "jsonl", "csv", "tsv", "parquet", "openai"]
Record = bytes | str | dict[str, Any]
MAX_LINE = 64 * 1024 * 1024  # bytes of one row
BOM = b"\xef\xbb\xbf"  # the mark that Windows editors put before UTF-8


class BadRow(Exception):
    """A record that cannot be read. The text says why; line: where, when the reader is who knows."""

    def __init__(self, why: str, line: int = 0) -> None:
        super().__init__(why)
        self.line = line


class Source(Protocol):
    """An open input. columns: of a table, None for anything else."""

    name: str
    kind: Kind
    columns: list[str] | None

    def records(self) -> Iterator[tuple[int, Record]]:
        """(number, record) of every record, from the beginning. Raises BadRow and EnvironmentFault."""

    def close(self) -> None: ...


def read_lines(name: str, file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number from 1, bytes with the line end) of every line, without a byte order mark."""
    file.seek(0)
    line = 0
    while True:
        try:
            raw = file.readline(MAX_LINE + 1)
        except OSError as error:
            raise EnvironmentFault(f"{name} cannot be read: {error.strerror}.") from None
        if not raw:
            return
        line += 1
        if len(raw) > MAX_LINE:
            raise BadRow(f"it is longer than {MAX_LINE:,} bytes", line)
        yield line, raw.removeprefix(BOM) if line == 1 else raw


def decoded(line: int, raw: bytes) -> str:
    """A line as text. Raises BadRow."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow(f"it is not UTF-8 (byte {error.start + 1}: 0x{raw[error.start]:02x})", line) from None
