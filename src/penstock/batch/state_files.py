"""Hidden states as a file that others read: safetensors, npz or parquet, written in pieces from the store of a run.

Names: `layer_I` for hidden state I. Pooled, each is [rows, width], a row with an error being NaN. Token by token, each
is [tokens of all rows, width]; row r has those from offsets[r] to offsets[r + 1], and `token_ids` are alike. `ids` are
those of the rows; in safetensors, which has no texts, they are a JSON list in the metadata. Parquet has a line a row.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from penstock.batch.states import StateRow, StateStore
from penstock.errors import EnvironmentFault, PartialResults, UsageError

FORMATS = (".safetensors", ".npz", ".parquet")
_GROUP = 64 * 1024 * 1024  # bytes of states in a row group of parquet


def check_format(output: Path) -> None:
    """Raises UsageError for a name that says no format, EnvironmentFault where the format's library is missing."""
    if output.suffix not in FORMATS:
        raise UsageError(
            f"The output {output} says no format.", f"Its name may end in {', '.join(FORMATS)}.", "Name it accordingly."
        )
    if output.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise EnvironmentFault(
                "Parquet files need the package pyarrow.", "", "pip install 'penstock[parquet]', or write .npz"
            ) from None


def write_states(output: Path, store: StateStore, layers: tuple[int, ...], pooled: bool, about: dict[str, Any]) -> None:
    """Write the file whole, and only then under its name. about: goes into the metadata, with the errors by id.

    layers: the numbers of the hidden states, in the order of the store. Raises PartialResults where no row has any
    states, or the disk is full; what is computed stays.
    """
    index = _Index(store)
    if not index.width:
        raise PartialResults("No row has hidden states: all ended in errors.", "", "Look at the rows' errors above.")
    errors = {str(row.id): row.error for row in store.rows() if row.error is not None}
    facts = {**about, "errors": errors}
    part = output.with_name(output.name + ".writing")
    try:
        with part.open("wb") as file:
            if output.suffix == ".parquet":
                _write_parquet(file, store, index, layers, pooled, facts)
            else:
                arrays = list(_arrays(store, index, layers, pooled))
                if output.suffix == ".npz":
                    _write_npz(file, arrays, index.ids, facts)
                else:
                    _write_safetensors(file, arrays, index.ids, facts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, output)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise PartialResults(
            f"The output {output} cannot be written: {error.strerror}.",
            f"The states of {len(store.done):,} rows are computed and stay in {store.data_path.name}.",
            "Free some space and run the same command again: nothing is computed twice.",
        ) from error


class _Index:
    """Ids and sizes of all rows."""

    def __init__(self, store: StateStore) -> None:
        self.ids: list[int | str] = []
        self.width = 0
        offsets = [0]
        for row in store.rows():
            self.ids.append(row.id)
            self.width = self.width or row.width
            offsets.append(offsets[-1] + row.tokens)
        if not all(isinstance(i, int) for i in self.ids):
            self.ids = [str(i) for i in self.ids]
        self.offsets = np.array(offsets, np.int64)


Array = tuple[str, str, tuple[int, ...], Iterator[bytes]]  # name, numpy's word for the type, shape, content


def _arrays(store: StateStore, index: _Index, layers: tuple[int, ...], pooled: bool) -> Iterator[Array]:
    count = len(index.ids) if pooled else int(index.offsets[-1])
    for place, layer in enumerate(layers):
        yield f"layer_{layer}", "<f4", (count, index.width), _layer(store, place, index.width, pooled)
    if not pooled:
        yield "offsets", "<i8", index.offsets.shape, iter((index.offsets.tobytes(),))
        ids = (np.array(row.token_ids, np.int64).tobytes() for row in store.rows())
        yield "token_ids", "<i8", (count,), ids


def _layer(store: StateStore, place: int, width: int, pooled: bool) -> Iterator[bytes]:
    for row in store.rows():
        for chunk in row.chunks:
            yield store.read(row, chunk, place)
        if pooled and not row.chunks:
            yield np.full(width, np.nan, np.float32).tobytes()


def _write_safetensors(file: BinaryIO, arrays: list[Array], ids: list[int | str], about: dict[str, Any]) -> None:
    types = {"<f4": ("F32", 4), "<i8": ("I64", 8)}
    facts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    header: dict[str, Any] = {"__metadata__": {**facts, "ids": json.dumps(ids)}}
    at = 0
    for name, kind, shape, _ in arrays:
        word, size = types[kind]
        end = at + int(np.prod(shape, dtype=object)) * size
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for _, _, _, content in arrays:
        file.writelines(content)


def _write_npz(file: BinaryIO, arrays: list[Array], ids: list[int | str], about: dict[str, Any]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, kind, shape, content in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                facts = {"descr": kind, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, facts)
                for piece in content:
                    member.write(piece)
        for name, array in (("ids", np.array(ids)), ("about", np.array(json.dumps(about)))):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _write_parquet(
    file: BinaryIO, store: StateStore, index: _Index, layers: tuple[int, ...], pooled: bool, about: dict[str, Any]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    vector = pa.list_(pa.float32(), index.width)
    fields = [("id", pa.int64() if isinstance(index.ids[0], int) else pa.string())]
    fields += [] if pooled else [("token_ids", pa.list_(pa.int64()))]
    fields += [(f"layer_{layer}", vector if pooled else pa.list_(vector)) for layer in layers]
    schema = pa.schema(fields, metadata={"penstock": json.dumps(about)})
    names = schema.names
    with pq.ParquetWriter(file, schema) as writer:
        rows: list[dict[str, Any]] = []
        size = 0
        for row_id, row in zip(index.ids, store.rows(), strict=True):
            states = [_states(store, row, place, pooled) for place in range(len(layers))]
            rows.append(dict(zip(names, [row_id, *([] if pooled else [row.token_ids]), *states], strict=True)))
            size += 4 * row.tokens * row.width * len(layers)
            if size >= _GROUP:
                writer.write_table(pa.Table.from_pylist(rows, schema))
                rows, size = [], 0
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema))


def _states(store: StateStore, row: StateRow, place: int, pooled: bool) -> list[Any] | None:
    """One row's states of one layer; None for a row with an error."""
    if not row.chunks:
        return None
    raw = b"".join(store.read(row, chunk, place) for chunk in row.chunks)
    found: list[Any] = list(np.frombuffer(raw, np.float32).reshape(-1, row.width))
    return found[0] if pooled else found
