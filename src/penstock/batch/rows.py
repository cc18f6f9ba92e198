"""Rows in: prompts from a text file, a JSONL file or stdin, checked whole before the first token is generated.

A text file has one prompt a line. A JSONL file has one object a line: `prompt` or `prompt_token_ids`, perhaps `id`,
perhaps the fields of `Parameters`. Empty lines are skipped in both. A row without an id has its line number as id.
The file is read line by line, twice: once to check and hash it, once to run; only the ids stay in memory.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import msgspec

from penstock.batch.parameters import Parameters
from penstock.errors import EnvironmentFault, UsageError

Format = Literal["auto", "txt", "jsonl"]
MAX_LINE = 64 * 1024 * 1024  # bytes of one row
RowId = int | str


class Row(Parameters, kw_only=True):
    """One row as it stands in a JSONL file."""

    id: RowId | None = None
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None


class InputSummary(msgspec.Struct, frozen=True):
    """What the first reading found. text_line: the first line with a text prompt, None when all are token ids."""

    rows: int
    sha256: str
    text_line: int | None


class RowFile:
    """The rows of one input. Iterating gives every row, its id set; errors name the line."""

    def __init__(self, path: Path | None, form: Format = "auto") -> None:
        """path: the file, or None for stdin (spooled to a temporary file, for it is read twice)."""
        self.name = "stdin" if path is None else str(path)
        self._file = _spool_stdin() if path is None else _open(path)
        self.jsonl = self._is_jsonl(path, form)
        self._decoder = msgspec.json.Decoder(Row)

    def _is_jsonl(self, path: Path | None, form: Format) -> bool:
        if form != "auto":
            return form == "jsonl"
        if path is not None and path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
            return True
        if path is not None and path.suffix.lower() in (".txt", ".text"):
            return False
        self._file.seek(0)
        return self._file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b'{"')

    def check(self) -> InputSummary:
        """Read everything once. Raises UsageError for the first bad line, a repeated id, or no rows at all."""
        digest = hashlib.sha256(b"jsonl\n" if self.jsonl else b"txt\n")
        seen: dict[str, int] = {}
        rows, text_line = 0, None
        for line, raw in self._lines():
            digest.update(raw)
            row = self._row(line, raw)
            if row is None:
                continue
            rows += 1
            if text_line is None and row.prompt is not None:
                text_line = line
            if self.jsonl and seen.setdefault(str(row.id), line) != line:
                raise self._bad(line, f"the id {row.id!r} is that of line {seen[str(row.id)]} already")
        if rows == 0:
            raise UsageError(f"{self.name} holds no prompts.", "It is empty, or all its lines are.")
        return InputSummary(rows, digest.hexdigest(), text_line)

    def __iter__(self) -> Iterator[Row]:
        for line, raw in self._lines():
            row = self._row(line, raw)
            if row is not None:
                yield row

    def close(self) -> None:
        """Close the input."""
        self._file.close()

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number from 1, bytes with the line end) of every line."""
        self._file.seek(0)
        line = 0
        while True:
            try:
                raw = self._file.readline(MAX_LINE + 1)
            except OSError as error:
                raise EnvironmentFault(f"{self.name} cannot be read: {error.strerror}.") from None
            if not raw:
                return
            line += 1
            if len(raw) > MAX_LINE:
                raise self._bad(line, f"it is longer than {MAX_LINE:,} bytes")
            if line == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # the mark that Windows editors put before UTF-8
            yield line, raw

    def _row(self, line: int, raw: bytes) -> Row | None:
        """One row, or None for an empty line."""
        if not raw.strip():
            return None
        try:
            if not self.jsonl:
                return Row(id=line, prompt=raw.rstrip(b"\r\n").decode("utf-8"))
            row = self._decoder.decode(raw)
        except UnicodeDecodeError as error:
            raise self._bad(
                line, f"it is not UTF-8 (byte {error.start + 1}: 0x{error.object[error.start]:02x})"
            ) from None
        except RecursionError:
            raise self._bad(line, "it is nested too deep") from None
        except msgspec.DecodeError as error:
            raise self._bad(line, _reason(str(error), raw)) from None
        if (row.prompt is None) == (row.prompt_token_ids is None):
            both = row.prompt is not None
            raise self._bad(line, "it has both prompt and prompt_token_ids" if both else "it has no prompt")
        if row.id is None:
            row.id = line
        elif isinstance(row.id, int) and not -(2**63) <= row.id < 2**63:
            raise self._bad(line, "its id does not fit 64 bits")
        return row

    def _bad(self, line: int, why: str) -> UsageError:
        hint = 'A row is, for example: {"id": "a1", "prompt": "Hello", "max_new_tokens": 20}' if self.jsonl else ""
        return UsageError(f"{self.name}, line {line}: {why}.", "Nothing was generated.", hint)


def _reason(message: str, raw: bytes) -> str:
    """The JSON library's message in the words of the file."""
    message = message.replace("`", "'").removesuffix(".")
    if message.startswith("Object contains unknown field"):
        return f"{message.removeprefix('Object contains ')}; known are {', '.join(Row.__struct_fields__)}"
    if "malformed" in message or "truncated" in message:
        words = [w for w in ("NaN", "Infinity") if w.encode() in raw]
        return f"{message}{f' ({words[0]} is not JSON)' if words else ''}"
    return f"{message[0].lower()}{message[1:]}"


def _open(path: Path) -> BinaryIO:
    try:
        if stat.S_ISDIR(os.stat(path).st_mode):
            raise EnvironmentFault(f"The input {path} is a folder.", "", "Give a .txt or .jsonl file.")
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
    spool = tempfile.TemporaryFile()  # noqa: SIM115 (closed by RowFile.close)
    try:
        shutil.copyfileobj(source, spool)
    except OSError as error:
        raise EnvironmentFault(
            f"The input cannot be stored in {tempfile.gettempdir()}: {error.strerror}.",
            "",
            "Set TMPDIR to a folder with space, or give the prompts as a file.",
        ) from None
    return spool
