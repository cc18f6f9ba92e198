"""What the rows of an output belong to: model, input and parameters, kept in a small file beside it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec

from penstock import __version__
from penstock.batch.parameters import Parameters
from penstock.batch.rows import InputSummary
from penstock.errors import EnvironmentFault, UsageError


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One run's identity. The three SHA-256 must agree for a rerun to continue an output."""

    penstock: str = __version__
    model: str
    model_sha256: str
    input: str
    input_sha256: str
    rows: int
    parameters: dict[str, Any]
    parameters_sha256: str


def make_record(
    model: str, model_sha256: str, source: str, found: InputSummary, run: Parameters, dtype: str, quantize: str
) -> RunRecord:
    """The record of a run. Only what changes the text counts as a parameter: not batch sizes, not threads."""
    parameters = {**msgspec.to_builtins(run), "dtype": dtype, "quantize": quantize}
    return RunRecord(
        model=model,
        model_sha256=model_sha256,
        input=source,
        input_sha256=found.sha256,
        rows=found.rows,
        parameters=parameters,
        parameters_sha256=hashlib.sha256(msgspec.json.encode(parameters, order="sorted")).hexdigest(),
    )


def record_path(output: Path) -> Path:
    """Where the record of an output lies."""
    return output.with_name(output.name + ".meta.json")


def read_record(output: Path) -> RunRecord | None:
    """The record beside an output; None when there is none, or it cannot be understood."""
    try:
        return msgspec.json.decode(record_path(output).read_bytes(), type=RunRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def write_record(output: Path, record: RunRecord) -> None:
    """Write the record whole, private and durable, before the first row."""
    path = record_path(output)
    part = path.with_name(path.name + ".part")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(record)) + b"\n")
            file.flush()
            os.fsync(fd)
        os.replace(part, path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise EnvironmentFault(
            f"{path} cannot be written: {error.strerror}.", "", "Free some space, or give another output."
        ) from None


def check_same(output: Path, earlier: RunRecord, now: RunRecord) -> None:
    """Raise UsageError, naming what changed, when the rows of `output` are not this run's."""
    changes = []
    if earlier.model_sha256 != now.model_sha256:
        changes.append(f"the model ({earlier.model}, now {now.model})")
    if earlier.input_sha256 != now.input_sha256:
        changes.append(f"the input ({earlier.input} with {earlier.rows:,} rows, now {now.input} with {now.rows:,})")
    if earlier.parameters_sha256 != now.parameters_sha256:
        names = sorted(earlier.parameters.keys() | now.parameters.keys())
        old, new = earlier.parameters, now.parameters
        different = [f"{n}: {old.get(n)!r}, now {new.get(n)!r}" for n in names if old.get(n) != new.get(n)]
        changes.append(f"the parameters ({'; '.join(different)[:300]})")
    if changes:
        raise UsageError(
            f"The output {output} belongs to another run.",
            f"Changed: {' and '.join(changes)}.",
            "Give another output, or --overwrite to lose what it holds and start again.",
        )
