"""The folder of a farm: what is in it, how it is made, and how its immutable parts are read.

    farm.json            the manifest, written once
    rows-X.jsonl         the prompts, one a line, in the order of the input
    shards-X.jsonl       for each shard its rows, bytes and SHA-256
    spool/LIFE.jsonl     a journal for each life of a worker
    spool/000012.0       a hard link to the journal of the life that claimed shard 12 first; .1: the next one
    spool/000012.done    a hard link to the journal of the life that completed it
    stop                 is there when the farm was cancelled
    jobs/, logs/         what was submitted to Slurm, and what it printed
    output.jsonl         after `merge`

Shards are ranges of one file and claims are links, so that a million prompts take a few inodes a worker.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from penstock.batch.farm.manifest import VERSION, Manifest, Shard
from penstock.batch.lines import sync_folder
from penstock.batch.record import RunRecord, differences
from penstock.batch.rows import Row
from penstock.errors import EnvironmentFault, UsageError

_ROW = msgspec.json.Decoder(Row)


class _ShardLine(msgspec.Struct):
    rows: int
    bytes: int
    sha256: str


class Spool:
    """An existing farm."""

    def __init__(self, folder: Path) -> None:
        """Open it. Raises UsageError when the folder holds no farm, EnvironmentFault when it is damaged."""
        self.folder = folder
        self.path = folder / "spool"
        try:
            data = (folder / "farm.json").read_bytes()
        except FileNotFoundError:
            raise UsageError(
                f"{folder} holds no farm.",
                "farm.json is not in it.",
                "Name the folder that was given as --output.",
            ) from None
        except OSError as error:
            raise EnvironmentFault(f"{folder / 'farm.json'} cannot be read: {error.strerror}.") from None
        try:
            self.manifest = msgspec.json.decode(data, type=Manifest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise EnvironmentFault(
                f"{folder / 'farm.json'} is not the record of a farm that this version ({VERSION}) can read.",
                f"{error}.",
            ) from None
        self.shards = self._read_shards()
        self.total = sum(shard.rows for shard in self.shards)

    def _read_shards(self) -> list[Shard]:
        path = self.folder / self.manifest.shards
        try:
            data = path.read_bytes()
        except OSError as error:
            raise EnvironmentFault(f"{path} cannot be read: {error.strerror}.") from None
        if hashlib.sha256(data).hexdigest() != self.manifest.shards_sha256:
            raise EnvironmentFault(f"{path} is not what it was: its SHA-256 differs from farm.json's.")
        shards: list[Shard] = []
        first = offset = 0
        decoder = msgspec.json.Decoder(_ShardLine)
        for number, line in enumerate(data.splitlines()):
            entry = decoder.decode(line)
            shards.append(Shard(number, first, entry.rows, offset, entry.bytes, entry.sha256))
            first, offset = first + entry.rows, offset + entry.bytes
        return shards

    def read(self, shard: Shard) -> list[Row]:
        """The rows of a shard. Raises EnvironmentFault when the file is not what it was."""
        path = self.folder / self.manifest.rows
        try:
            with path.open("rb") as file:
                file.seek(shard.offset)
                data = file.read(shard.size)
        except OSError as error:
            raise EnvironmentFault(f"{path} cannot be read: {error.strerror}.") from None
        if hashlib.sha256(data).hexdigest() != shard.sha256:
            raise EnvironmentFault(
                f"Shard {shard.number} of {path} is not what it was: its SHA-256 differs.",
                "Something has changed the file, or the disk has.",
                "Start a farm with another --output.",
            )
        return [_ROW.decode(line) for line in data.splitlines()]

    def claim(self, shard: int, number: int) -> Path:
        """The path of a claim; number: how many lives had the shard before."""
        return self.path / f"{shard:06}.{number}"

    def done(self, shard: int) -> Path:
        """The path of the mark that a shard is complete."""
        return self.path / f"{shard:06}.done"

    def journal(self, life: str) -> Path:
        """The path of a life's journal."""
        return self.path / f"{life}.jsonl"

    def names(self) -> list[str]:
        """The names in the spool, as the file system lists them: perhaps late, so a hint and never a proof."""
        try:
            return os.listdir(self.path)
        except OSError as error:
            raise EnvironmentFault(f"{self.path} cannot be read: {error.strerror}.") from None

    @property
    def stop(self) -> Path:
        return self.folder / "stop"

    def complete(self) -> bool:
        """Whether every shard is done."""
        return all(self.done(shard.number).exists() for shard in self.shards)

    def cancelled(self) -> bool:
        """Whether the farm was cancelled."""
        return self.stop.exists()


def create(folder: Path, rows: Iterable[Row], manifest: Manifest) -> Spool:
    """Make a farm of `rows`, or open the one that is there if it is the same.

    manifest: complete but for the names and the hash of the files, which are filled in here. The farm is there as
    soon as farm.json is, which happens at once and whole; of two that are made at the same time one wins.
    Raises UsageError, naming the difference, when the folder holds another farm or something else.
    """
    if (folder / "farm.json").exists():
        return _the_same(folder, manifest)
    _make_folders(folder)
    tag = secrets.token_hex(4)
    names = {"rows": f"rows-{tag}.jsonl", "shards": f"shards-{tag}.jsonl"}
    part = folder / f"farm-{tag}.part"
    try:
        lines = b"".join(_write_rows(folder / names["rows"], rows, manifest.shard_rows))
        _write(folder / names["shards"], lines)
        manifest = msgspec.structs.replace(manifest, **names, shards_sha256=hashlib.sha256(lines).hexdigest())
        _write(part, msgspec.json.format(msgspec.json.encode(manifest)) + b"\n")
        try:
            os.link(part, folder / "farm.json")
            sync_folder(folder)
        except FileExistsError:
            if not os.path.samefile(part, folder / "farm.json"):  # a lost answer to our own link looks like this, too
                _forget(folder, names.values())
                return _the_same(folder, manifest)
    except OSError as error:
        _forget(folder, names.values())
        raise EnvironmentFault(
            f"The farm cannot be made in {folder}: {error.strerror}.",
            "The file system has no hard links, which claims need." if error.errno in _NO_LINKS else "",
            "Give another --output." if error.errno in _NO_LINKS else "Free some space, or give another --output.",
        ) from None
    finally:
        _forget(folder, [part.name])
    return Spool(folder)


_NO_LINKS = (1, 18, 38, 95)  # EPERM, EXDEV, ENOSYS, EOPNOTSUPP: what file systems without links say


def _the_same(folder: Path, manifest: Manifest) -> Spool:
    spool = Spool(folder)
    check_same(spool, manifest.record)
    return spool


def check_same(spool: Spool, now: RunRecord) -> None:
    """Raise UsageError, naming what changed, when a farm is not of this model, these prompts and parameters."""
    earlier = spool.manifest.record
    changes = differences(earlier, now)
    if earlier.input_sha256 != now.input_sha256:
        changes.append(f"the prompts ({earlier.input} with {earlier.rows:,}, now {now.input} with {now.rows:,})")
    if changes:
        raise UsageError(
            f"The folder {spool.folder} holds another farm.",
            f"Changed: {' and '.join(changes)}.",
            "Give another --output, or the prompts, model and parameters that it was made with.",
        )


def _make_folders(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("spool", "jobs", "logs"):
            (folder / name).mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise EnvironmentFault(f"The folder {folder} cannot be made: {error.strerror}.") from None


def _write_rows(path: Path, rows: Iterable[Row], shard_rows: int) -> Iterator[bytes]:
    """Write all rows; yields the line of every shard."""
    encoder = msgspec.json.Encoder()
    source = iter(rows)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        while chunk := list(itertools.islice(source, shard_rows)):
            data = b"".join(encoder.encode(row) + b"\n" for row in chunk)
            file.write(data)
            line = _ShardLine(len(chunk), len(data), hashlib.sha256(data).hexdigest())
            yield encoder.encode(line) + b"\n"
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _forget(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
