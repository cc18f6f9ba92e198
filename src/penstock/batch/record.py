"""What the rows of an output belong to: model, input and parameters, kept in a small file beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from penstock import __version__
from penstock.batch.lines import write_whole
from penstock.batch.parameters import Parameters
from penstock.errors import EnvironmentFault, UsageError


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One run's identity. Model and parameters must agree for a rerun to continue an output; of the input, the rows
    that are done (`results.ResultWriter`)."""

    penstock: str = __version__
    model: str
    model_sha256: str
    input: str
    input_sha256: str
    rows: int
    parameters: dict[str, Any]
    parameters_sha256: str


def make_record(
    model: str,
    model_sha256: str,
    source: str,
    input_sha256: str,
    rows: int,
    parameters: Parameters,
    settings: Mapping[str, Any],
) -> RunRecord:
    """The record of a run. settings: what changes the text beside the parameters, such as dtype, quantize and how the
    input is read; batch sizes and threads do not."""
    merged = {**msgspec.to_builtins(parameters), **settings}
    return RunRecord(
        model=model,
        model_sha256=model_sha256,
        input=source,
        input_sha256=input_sha256,
        rows=rows,
        parameters=merged,
        parameters_sha256=hashlib.sha256(msgspec.json.encode(merged, order="sorted")).hexdigest(),
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
    try:
        write_whole(path, msgspec.json.format(msgspec.json.encode(record)) + b"\n")
    except OSError as error:
        raise EnvironmentFault(
            f"{path} cannot be written: {error.strerror}.", "", "Free some space, or give another output."
        ) from None


def differences(earlier: RunRecord, now: RunRecord) -> list[str]:
    """What changed of model and parameters, in words."""
    changes = []
    if earlier.model_sha256 != now.model_sha256:
        changes.append(f"the model ({earlier.model}, now {now.model})")
    if earlier.parameters_sha256 != now.parameters_sha256:
        names = sorted(earlier.parameters.keys() | now.parameters.keys())
        old, new = earlier.parameters, now.parameters
        different = [f"{n}: {old.get(n)!r}, now {new.get(n)!r}" for n in names if old.get(n) != new.get(n)]
        changes.append(f"the parameters ({'; '.join(different)[:300]})")
    return changes


def another_run(output: Path, changes: list[str]) -> UsageError:
    """The error for an output whose rows are not this run's."""
    return UsageError(
        f"The output {output} belongs to another run.",
        f"Changed: {' and '.join(changes)}.",
        "Give another output, or --overwrite to lose what it holds and start again.",
    )
