"""Rows in: what a row may ask for, its identity, and a whole input checked before the first token is generated.

An input is read twice, as a stream: once to check and hash it, once to run. What stays in memory is eight bytes a row
(`RowFile.check`), so that ten million rows are no trouble.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from penstock.batch.parameters import Parameters
from penstock.batch.records import BadRow, Source
from penstock.batch.sources import open_source
from penstock.batch.templates import PromptTemplate
from penstock.errors import InvalidRequest, UsageError

Format = Literal["auto", "txt", "jsonl", "csv", "tsv", "parquet", "openai"]
RowId = int | str
HASH_BYTES = 8
TEXT_COLUMNS = ("prompt", "text")  # where a table's prompts are looked for, and what a line of text is called


class Row(Parameters, kw_only=True):
    """One row as it stands in a JSONL file: an id, a prompt in one of three forms, parameters of its own.

    messages: a conversation, for the model's chat template.
    """

    id: RowId | None = None
    prompt: str | None = None
    prompt_token_ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None

    @property
    def name(self) -> RowId:
        """The id, which every row has once it was read."""
        if self.id is None:
            raise ValueError("a row from a RowFile has an id")
        return self.id

    def identity(self) -> str:
        """16 hex digits of the SHA-256 of the id and of all that the row asks for: the same row, the same text."""
        return hashlib.sha256(_CANONICAL.encode(self)).hexdigest()[: 2 * HASH_BYTES]


_CANONICAL = msgspec.json.Encoder(order="deterministic")
_ROW = msgspec.json.Decoder(Row)
_OBJECT = msgspec.json.Decoder(dict[str, Any])
_FIELDS = frozenset(Row.__struct_fields__)


@dataclass(frozen=True)
class RowShape:
    """How rows lie in an input.

    separator: between the prompts of a text file, instead of the line's end. template: makes a prompt of a row's
    columns. column and id_column: of a table; by default `prompt` or `text`, and `id` where there is one.
    """

    separator: str | None = None
    template: str | None = None
    column: str | None = None
    id_column: str | None = None

    def settings(self) -> dict[str, str]:
        """What differs from the default, for the record of a run."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class InputSummary:
    """What the first reading found.

    sha256: over the identities of all rows, in order. text_line: the first line with text, None when all rows are token
    ids. keys: each row's identity as a number (uint64), in order.
    """

    rows: int
    sha256: str
    text_line: int | None
    keys: array[int]


class RowFile:
    """The rows of one input. Iterating gives every row, its id set; errors name the line."""

    def __init__(self, path: Path | None, form: Format = "auto", shape: RowShape = RowShape()) -> None:
        """path: the file, or None for stdin, which is copied to a temporary file because it is read twice.

        Raises EnvironmentFault and UsageError.
        """
        self.source: Source = open_source(path, form, shape.separator)
        self.name, self.kind = self.source.name, self.source.kind
        self._template = None if shape.template is None else PromptTemplate(shape.template)
        self._shape = shape
        if (shape.column or shape.id_column) and self.source.columns is None:
            self.close()
            raise UsageError(
                f"{self.name} is no table, so it has no columns to choose.",
                hint="Leave --column and --id-column out, or use --template '{name}' for the fields of JSON rows.",
            )

    def check(self) -> InputSummary:
        """Read everything once. Raises UsageError for the first bad line, a repeated id, or no rows at all."""
        digest = hashlib.sha256()
        keys, names = array("Q"), array("Q")
        text_line = None
        for line, row in self.numbered():
            identity = bytes.fromhex(row.identity())
            digest.update(identity)
            keys.append(int.from_bytes(identity))
            names.append(_key_of(row.name))
            if text_line is None and row.prompt_token_ids is None:
                text_line = line
        if not keys:
            raise UsageError(f"{self.name} holds no prompts.", "It is empty, or all its lines are.")
        self._check_names(names)
        return InputSummary(len(keys), digest.hexdigest(), text_line, keys)

    def __iter__(self) -> Iterator[Row]:
        return (row for _, row in self.numbered())

    def numbered(self) -> Iterator[tuple[int, Row]]:
        """(line number from 1, row) of every row."""
        if self.kind == "openai":
            raise UsageError(
                f"{self.name} holds requests of OpenAI's batch API.",
                hint="`penstock generate` and the server's /v1/batches answer them.",
            )
        try:
            for line, record in self.source.records():
                try:
                    row = self._row(line, record)
                except BadRow as error:
                    raise self._bad(line, str(error)) from None
                if row.id is None:
                    row.id = line
                yield line, row
        except BadRow as error:
            raise self._bad(error.line, str(error)) from None

    def close(self) -> None:
        """Close the input."""
        self.source.close()

    def _row(self, line: int, record: bytes | str | dict[str, Any]) -> Row:
        """One row of what the source holds: JSON, a text, or columns. Raises BadRow."""
        if isinstance(record, bytes):
            return self._json(record)
        if isinstance(record, str):
            if self._template is None:
                return Row(prompt=record)
            return Row(prompt=self._filled(dict.fromkeys(TEXT_COLUMNS, record)))
        return self._columns(record)

    def _json(self, raw: bytes) -> Row:
        try:
            row = _ROW.decode(raw) if self._template is None else self._templated(raw)
        except RecursionError:
            raise BadRow("it is nested too deep") from None
        except UnicodeDecodeError as error:
            raise BadRow(f"it is not UTF-8 (byte {error.start + 1}: 0x{error.object[error.start]:02x})") from None
        except msgspec.DecodeError as error:
            raise BadRow(_reason(str(error), raw)) from None
        given = [name for name in ("prompt", "prompt_token_ids", "messages") if getattr(row, name) is not None]
        if len(given) != 1:
            raise BadRow(f"it has both {' and '.join(given)}" if given else "it has no prompt")
        _check_id(row.id)
        return row

    def _templated(self, raw: bytes) -> Row:
        """A row whose prompt is made of its fields; those that the template does not use may still be parameters."""
        fields = _OBJECT.decode(raw)
        prompt = self._filled(fields)
        used = self._template.names if self._template is not None else frozenset()
        own = {name: fields[name] for name in fields if name in _FIELDS and (name not in used or name == "id")}
        for name in ("prompt", "prompt_token_ids", "messages"):
            own.pop(name, None)
        return msgspec.convert({**own, "prompt": prompt}, Row)

    def _columns(self, columns: dict[str, Any]) -> Row:
        """A row of a table. Raises BadRow."""
        shape = self._shape
        name = _identifier(columns.get(shape.id_column or "id"), shape.id_column)
        _check_id(name)
        if self._template is not None:
            return Row(id=name, prompt=self._filled(columns))
        column = shape.column or next((c for c in TEXT_COLUMNS if c in columns), None)
        if column is None and len(columns) == 1:
            column = next(iter(columns))
        if column is None or column not in columns:
            wanted = "which column has the prompts is not clear" if column is None else f"there is no column {column!r}"
            raise BadRow(f"{wanted}; it has {', '.join(map(str, list(columns)[:20]))} (--column NAME)")
        value = columns[column]
        if value is not None and not isinstance(value, str):
            raise BadRow(f"its {column} is no text but {value!r:.40}")
        return Row(id=name, prompt=value or "")

    def _filled(self, columns: dict[str, Any]) -> str:
        if self._template is None:
            raise ValueError("there is no template")
        try:
            return self._template.fill(columns)
        except InvalidRequest as error:
            raise BadRow(error.what) from None

    def _check_names(self, names: array[int]) -> None:
        """Raise UsageError where two rows have one id."""
        import numpy as np  # the server, which imports this module, does without

        ordered = np.sort(np.frombuffer(names, dtype=np.uint64))
        repeated = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
        if not repeated:
            return
        seen: dict[str, int] = {}
        for line, row in self.numbered():
            if _key_of(row.name) in repeated and seen.setdefault(str(row.name), line) != line:
                raise self._bad(line, f"the id {row.name!r} is that of line {seen[str(row.name)]} already")

    def _bad(self, line: int, why: str) -> UsageError:
        hint = 'A row is, for example: {"id": "a1", "prompt": "Hello", "max_new_tokens": 20}'
        return UsageError(
            f"{self.name}, line {line}: {why}.", "Nothing was generated.", hint if self.kind == "jsonl" else ""
        )


def key_number(identity: str) -> int:
    """An identity as the number that `InputSummary.keys` holds. Raises ValueError for anything else."""
    return int.from_bytes(bytes.fromhex(identity)[:HASH_BYTES])


def _key_of(name: RowId) -> int:
    """64 bits of an id; equal ids have equal ones."""
    return int.from_bytes(hashlib.sha256(str(name).encode("utf-8", "surrogatepass")).digest()[:8])


def _identifier(value: Any, asked: str | None) -> RowId | None:
    """The id in a cell. An empty one is none, unless the user named the column."""
    if value is None or value == "":
        if asked is not None:
            raise BadRow(f"its {asked} is empty")
        return None
    return value if isinstance(value, int | str) and not isinstance(value, bool) else str(value)


def _check_id(name: RowId | None) -> None:
    if isinstance(name, int) and not -(2**63) <= name < 2**63:
        raise BadRow("its id does not fit 64 bits")


def _reason(message: str, raw: bytes) -> str:
    """The JSON library's message in the words of the file."""
    message = message.replace("`", "'").removesuffix(".")
    if message.startswith("Object contains unknown field"):
        known = ", ".join(Row.__struct_fields__)
        return f"{message.removeprefix('Object contains ')}; known are {known}; --template makes prompts of others"
    if "malformed" in message or "truncated" in message:
        words = [w for w in ("NaN", "Infinity") if w.encode() in raw]
        return f"{message}{f' ({words[0]} is not JSON)' if words else ''}"
    return f"{message[0].lower()}{message[1:]}"
