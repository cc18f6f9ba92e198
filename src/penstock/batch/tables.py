"""Tables of prompts: CSV and TSV by the standard library, Parquet by pyarrow where it is installed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any, BinaryIO

from penstock.batch.records import MAX_LINE, BadRow, Kind, Record, decoded, read_lines
from penstock.errors import EnvironmentFault, UsageError

_BATCH = 256  # rows of a Parquet file in memory at a time


class CsvTable:
    """A table whose first line names its columns. A cell in quotes may have line ends; empty lines are no rows."""

    def __init__(self, name: str, kind: Kind, file: BinaryIO) -> None:
        """Raises UsageError for a header that cannot be used."""
        self.name, self.kind, self._file = name, kind, file
        self._delimiter = "\t" if kind == "tsv" else ","
        try:
            header = next((decoded(line, raw) for line, raw in read_lines(name, file)), "")
            if kind == "csv" and "," not in header and ";" in header:  # what spreadsheets write in half of Europe
                self._delimiter = ";"
            self.columns: list[str] | None = next((cells for _, cells in self._rows()), [])
        except BadRow as error:
            raise UsageError(f"{name}, line {error.line}: {error}.", "It should name the columns.") from None
        repeated = {column for column in self.columns if self.columns.count(column) > 1}
        if repeated:
            raise UsageError(f"{name} has two columns named {min(repeated)!r}.", hint="Rename one of them.")

    def records(self) -> Iterator[tuple[int, Record]]:
        rows = self._rows()
        _, columns = next(rows, (0, []))
        for line, cells in rows:
            if len(cells) != len(columns):
                raise BadRow(f"it has {len(cells)} cells, but there are {len(columns)} columns", line)
            yield line, dict(zip(columns, cells, strict=True))

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """(number of its first line, cells) of every row, the header first."""
        csv.field_size_limit(MAX_LINE)
        lines = (decoded(line, raw) for line, raw in read_lines(self.name, self._file))
        reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise BadRow(f"it is not CSV ({error})", line) from None
            if cells is None:
                return
            if cells:
                yield line, cells

    def close(self) -> None:
        self._file.close()


class ParquetTable:
    """A Parquet file, read a few hundred rows at a time."""

    kind: Kind = "parquet"

    def __init__(self, name: str, file: BinaryIO) -> None:
        """Raises EnvironmentFault without pyarrow, UsageError for what is no Parquet file."""
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise EnvironmentFault(
                "Parquet files need pyarrow, which is not installed.",
                hint="pip install 'penstock[parquet]', or give the prompts as .jsonl or .csv.",
            ) from None
        self.name, self._file = name, file
        file.seek(0)
        try:
            self._table: Any = parquet.ParquetFile(file, pre_buffer=False)
        except Exception as error:  # pyarrow's errors have no base of their own
            raise UsageError(
                f"{name} is no Parquet file, or a damaged one.", f"{error}".splitlines()[0][:200]
            ) from None
        self.columns: list[str] | None = list(self._table.schema_arrow.names)

    def records(self) -> Iterator[tuple[int, Record]]:
        number = 0
        try:
            for batch in self._table.iter_batches(batch_size=_BATCH):
                for columns in batch.to_pylist():
                    number += 1
                    yield number, columns
        except (OSError, ValueError) as error:  # pyarrow's errors are these too
            raise BadRow(f"it cannot be read ({str(error).splitlines()[0][:200]})", number + 1) from None

    def close(self) -> None:
        self._table.close()
        self._file.close()
