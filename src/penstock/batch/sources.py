"""The bytes behind an input: which format it has, and its records one by one, however large it is.

A record is a text (txt), the bytes of a line (jsonl, openai) or the columns of a row (csv, tsv, parquet). Records are
numbered from 1: lines of a file, or rows where a row is no line.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from penstock.batch.records import BOM, MAX_LINE, BadRow, Kind, Record, Source, decoded, read_lines
from penstock.errors import EnvironmentFault, UsageError

_CHUNK = 1 << 16
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".txt": "txt", ".text": "txt", ".csv": "csv",
    ".tsv": "tsv", ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
_ESCAPES = (("\\\\", "\0\0"), ("\\n", "\n"), ("\\t", "\t"), ("\\0", "\0"), ("\0\0", "\\"))


def open_source(path: Path | None, form: str = "auto", separator: str | None = None) -> Source:
    """path: the file, or None for stdin. form: a Kind, or auto: by the file's ending, else by its first bytes.

    separator: of the prompts of a text file. Raises EnvironmentFault, UsageError.
    """
    name = "stdin" if path is None else str(path)
    file = _spool_stdin() if path is None else _open(path)
    try:
        kind = _kind(path, file, form)
        if separator is not None:
            if form not in ("auto", "txt"):
                raise UsageError("--separator is for text files only.", f"The input is read as {kind}.")
            return SeparatedText(name, file, _unescaped(separator))
        if kind in ("csv", "tsv"):
            from penstock.batch.tables import CsvTable

            return CsvTable(name, kind, file)
        if kind == "parquet":
            from penstock.batch.tables import ParquetTable

            return ParquetTable(name, file)
        return Lines(name, kind, file)
    except BaseException:
        file.close()
        raise


class Lines:
    """A file of lines: texts, or JSON. Empty lines are no records."""

    columns: list[str] | None = None

    def __init__(self, name: str, kind: Kind, file: BinaryIO) -> None:
        self.name, self.kind, self._file = name, kind, file

    def records(self) -> Iterator[tuple[int, Record]]:
        for line, raw in read_lines(self.name, self._file):
            if not raw.strip():
                continue
            yield line, decoded(line, raw).rstrip("\r\n") if self.kind == "txt" else raw

    def close(self) -> None:
        self._file.close()


class SeparatedText:
    """A text file whose prompts may have several lines. Line ends around a prompt go; CRLF counts as LF."""

    columns: list[str] | None = None
    kind: Kind = "txt"

    def __init__(self, name: str, file: BinaryIO, separator: str) -> None:
        if not separator:
            raise UsageError("--separator cannot be empty.")
        self.name, self._file, self._separator = name, file, separator

    def records(self) -> Iterator[tuple[int, Record]]:
        for number, text in enumerate(self._pieces(), 1):
            if text.strip():
                yield number, text.strip("\n")

    def _pieces(self) -> Iterator[str]:
        self._file.seek(0)
        number, rest = 1, ""
        with open(os.dup(self._file.fileno()), encoding="utf-8-sig") as file:
            while True:
                try:
                    chunk = file.read(_CHUNK)
                except UnicodeDecodeError:
                    raise BadRow("it, or one soon behind it, is not UTF-8", number) from None
                if not chunk:
                    yield rest
                    return
                *whole, rest = (rest + chunk).split(self._separator)
                yield from whole
                number += len(whole)
                if len(rest) > MAX_LINE:
                    raise BadRow(f"it is longer than {MAX_LINE:,} characters", number)

    def close(self) -> None:
        self._file.close()


def _kind(path: Path | None, file: BinaryIO, form: str) -> Kind:
    if form != "auto":
        return form  # type: ignore[return-value]
    known = None if path is None else _KINDS.get(path.suffix.lower())
    if known not in (None, "jsonl"):
        return known
    file.seek(0)
    head = file.read(4)
    if known is None and head == b"PAR1":
        return "parquet"
    file.seek(0)
    first = file.readline(MAX_LINE).removeprefix(BOM)
    while first and not first.strip():
        first = file.readline(MAX_LINE)
    if known is None and not first.lstrip().startswith(b'{"'):
        return "txt"
    return "openai" if _is_openai(first) else "jsonl"


def _is_openai(line: bytes) -> bool:
    """Whether a line is one of OpenAI's batch files."""
    try:
        fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return "custom_id" in fields and "body" in fields


def _unescaped(text: str) -> str:
    for escape, meant in _ESCAPES:
        text = text.replace(escape, meant)
    return text


def _open(path: Path) -> BinaryIO:
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise EnvironmentFault(f"The input {path} is a folder.", "", "Give a file of prompts.")
        file = path.open("rb")
    except FileNotFoundError:
        raise EnvironmentFault(f"The input {path} does not exist.") from None
    except OSError as error:
        raise EnvironmentFault(f"The input {path} cannot be read: {error.strerror}.") from None
    return file if file.seekable() else _spool(file)


def _spool_stdin() -> BinaryIO:
    if sys.stdin.isatty():
        print("reading prompts from the terminal, one a line; end with Ctrl-D", file=sys.stderr)
    return _spool(sys.stdin.buffer)


def _spool(source: BinaryIO) -> BinaryIO:
    """Copy a stream to an unnamed temporary file on disk, which vanishes with the process."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (closed by the source)
    try:
        shutil.copyfileobj(source, spool)
    except OSError as error:
        raise EnvironmentFault(
            f"The input cannot be stored in {tempfile.gettempdir()}: {error.strerror}.",
            "",
            "Set TMPDIR to a folder with space, or give the prompts as a file.",
        ) from None
    return spool
