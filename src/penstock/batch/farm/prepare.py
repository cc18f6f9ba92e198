"""From what a user asks for to a farm on disk, or the one that is there and is the same."""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from penstock.batch.farm.manifest import (
    InputStamp,
    Manifest,
    ModelCopy,
    Profile,
    Timing,
    text_deciding,
)
from penstock.batch.farm.spool import Spool, create
from penstock.batch.parameters import Parameters
from penstock.batch.record import make_record
from penstock.batch.rows import Format, InputSummary, Row, RowFile, RowShape, key_number
from penstock.errors import ModelError, UsageError
from penstock.hub.fingerprint import fingerprint
from penstock.hub.snapshot import Snapshot
from penstock.text.tokenizer import load_tokenizer

SHARD_ROWS = 64
T = TypeVar("T")


@dataclass(frozen=True)
class Order:
    """A farm as it is asked for. find: the snapshot of a model's name; profiles[""] holds for every partition."""

    model: str
    find: Callable[[str], Snapshot]
    parameters: Parameters
    profiles: dict[str, Profile] = field(default_factory=dict)
    shard_rows: int = SHARD_ROWS
    timing: Timing = field(default_factory=Timing)
    stats: bool = False


@dataclass(frozen=True)
class Draft:
    """A farm that has not been made."""

    folder: Path
    manifest: Manifest


def prepare(order: Order, folder: Path, source: Path | None, form: Format, shape: RowShape) -> Spool:
    """Make the farm of a file of prompts (None: stdin). Raises PenstockError, naming what differs from a farm that is
    there."""
    return _of_file(order, source, form, shape, lambda rows, manifest: _create(folder, rows, manifest))


def draft(order: Order, folder: Path, source: Path | None, form: Format, shape: RowShape) -> Draft:
    """What `prepare` would make, with everything checked and nothing written. Raises PenstockError."""

    def planned(rows: Iterable[Row], manifest: Manifest) -> Draft:
        if not (folder / "farm.json").exists():
            return Draft(folder, manifest)
        return Draft(folder, _create(folder, rows, manifest).manifest)

    return _of_file(order, source, form, shape, planned)


def _of_file(
    order: Order, source: Path | None, form: Format, shape: RowShape, use: Callable[[Iterable[Row], Manifest], T]
) -> T:
    """What `use` makes of the rows of a file and their farm's manifest."""
    with contextlib.closing(RowFile(source, form, shape)) as rows:
        if rows.kind == "openai":
            raise UsageError(
                f"{rows.name} is a batch file of OpenAI's, which the farm does not take.",
                "",
                "`penstock generate` takes it; for the farm, write rows with `messages` and `id`.",
            )
        found = rows.check()
        stamp = None
        if source is not None:
            state = os.stat(source)
            path = str(source.resolve())
            stamp = InputStamp(
                path=path, size=state.st_size, mtime_ns=state.st_mtime_ns, form=form, shape=shape.settings()
            )
        return use(rows, _manifest(order, found, rows.name, stamp))


def prepare_rows(order: Order, folder: Path, rows: Sequence[Row], name: str) -> Spool:
    """The same for rows in memory, all with ids. Raises PenstockError."""
    keys = array("Q", (key_number(row.identity()) for row in rows))
    if not keys:
        raise UsageError("There are no prompts.")
    if len({str(row.name) for row in rows}) < len(rows):
        raise UsageError("Two prompts have the same id.")
    digest = hashlib.sha256(b"".join(bytes.fromhex(row.identity()) for row in rows)).hexdigest()
    text = next((number for number, row in enumerate(rows, 1) if row.prompt_token_ids is None), None)
    return _create(folder, rows, _manifest(order, InputSummary(len(rows), digest, text, keys), name, None))


def _create(folder: Path, rows: Iterable[Row], manifest: Manifest) -> Spool:
    """Make or open the farm; of one that is there, what does not change the text is as it is asked for now."""
    spool = create(folder, rows, manifest)
    spool.manifest = spool.manifest.adjusted(manifest.profiles)
    return spool


def _manifest(order: Order, found: InputSummary, name: str, stamp: InputStamp | None) -> Manifest:
    """All of it but for the names and the hash of the files. Raises PenstockError."""
    models = {"": _copy(order.find(order.model))}
    for partition, profile in order.profiles.items():
        if profile.model is not None:
            models[partition] = _copy(order.find(profile.model))
    if found.text_line is not None:
        _check_tokenizers(models, name, found.text_line)
    common = order.profiles.get("", Profile())
    settings = {"dtype": common.dtype or "auto", "quantize": common.quantize or "none"}
    shape = {} if stamp is None else stamp.shape
    deciding = text_deciding(models, order.profiles)
    record = make_record(
        models[""].name,
        models[""].sha256,
        name,
        found.sha256,
        found.rows,
        order.parameters,
        {**settings, **shape, **({"profiles": deciding} if deciding else {})},
    )
    return Manifest(
        record=record,
        parameters=order.parameters,
        rows="",
        shards="",
        shards_sha256="",
        models=models,
        profiles=order.profiles,
        shard_rows=order.shard_rows,
        timing=order.timing,
        source=stamp,
        stats=order.stats,
    )


def reopen(folder: Path) -> Spool:
    """A farm that is to go on, whether it was cancelled or not. Raises UsageError, naming what has changed."""
    spool = Spool(folder)
    check_unchanged(spool)
    with contextlib.suppress(FileNotFoundError):
        spool.stop.unlink()
    return spool


def check_unchanged(spool: Spool) -> None:
    """Raise UsageError when the file of prompts or a model is not what it was when the farm was made."""
    stamp = spool.manifest.source
    if stamp is not None:
        _check_source(spool, stamp)
    for model in spool.manifest.models.values():
        check_model(model)


def check_model(model: ModelCopy) -> None:
    """Raise UsageError when a model's folder is not what it was."""
    if not Path(model.path).is_dir():
        raise ModelError(f"The model {model.name} is not in {model.path} any more.", "", "Bring it back there.")
    if fingerprint(Path(model.path)) != model.sha256:
        raise UsageError(
            f"The model {model.name} in {model.path} has changed since the farm was made.",
            f"Its SHA-256 was {model.sha256[:12]}..., and is another now.",
            "Bring the old one back, or start a farm with another --output.",
        )


def _check_source(spool: Spool, stamp: InputStamp) -> None:
    path = Path(stamp.path)
    try:
        state = path.stat()
    except OSError:
        return  # the farm has its own copy
    if (state.st_size, state.st_mtime_ns) == (stamp.size, stamp.mtime_ns):
        return
    form: Format = stamp.form  # type: ignore[assignment]
    with contextlib.closing(RowFile(path, form, RowShape(**stamp.shape))) as rows:
        found = rows.check()
    record = spool.manifest.record
    if found.sha256 != record.input_sha256:
        raise UsageError(
            f"The prompts in {path} have changed since the farm was made.",
            f"There were {record.rows:,} rows with SHA-256 {record.input_sha256[:12]}...; now there are {found.rows:,} "
            f"with {found.sha256[:12]}...",
            "Bring the old file back, or move it away (the farm has its own copy), or give another --output.",
        )


def _copy(snapshot: Snapshot) -> ModelCopy:
    return ModelCopy(
        name=snapshot.name, path=str(snapshot.path), sha256=fingerprint(snapshot.path), trusted=snapshot.trusted
    )


def _check_tokenizers(models: dict[str, ModelCopy], name: str, line: int) -> None:
    for model in models.values():
        if load_tokenizer(Path(model.path)) is None:
            raise ModelError(
                f"The model {model.name} has no tokenizer, but {name} has text (line {line}).",
                f"{model.path} holds no tokenizer.json.",
                "Give rows with prompt_token_ids, or copy the tokenizer's files into the folder.",
            )
