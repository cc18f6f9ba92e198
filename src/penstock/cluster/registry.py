"""Which servers there are: directories on the file system that login nodes and compute nodes share.

    JOBS/NAME/0003/launch.json    what was asked for
                   job.sh         the batch script
                   key            the key of this launch, made at submission; its renewals and requeues keep it
                   jobs/4711      one empty file for each job of the launch
                   servers/4711   what the server of that job says about itself (Record), rewritten every few seconds
                   4711.log       what it printed
                   stopped        made by `penstock stop`

`mkdir` of the next number is what makes one of two submissions at once the winner. All of it is private to the user.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from penstock.cluster.files import cannot_write, create_private, private_directory, server_time, write_private
from penstock.errors import EnvironmentFault, UsageError
from penstock.plan.site import load_site

T = TypeVar("T")
KEPT = 5  # launches of a name whose scripts and logs stay
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", re.ASCII)
_NUMBER = re.compile(r"\d{4,}", re.ASCII)


class Order(msgspec.Struct, frozen=True):
    """What was asked for. command: how the server is started; renew_minutes: when a successor starts, after the start
    of each job (None: never); drain_seconds: for running requests at the end."""

    model: str
    key_file: str | None
    renew_minutes: int | None = None
    drain_seconds: float = 25.0
    staged: bool = False


class Record(msgspec.Struct, frozen=True):
    """What the server of one job says about itself. Times are seconds since 1970 on the node's clock.

    state: starting, ready, leaving, ended. restart: how often Slurm has put the job back into the queue.
    """

    job: str
    restart: int
    node: str
    state: str
    model: str
    since: float
    host: str | None = None
    port: int | None = None
    socket: str | None = None
    key_file: str | None = None
    ready_at: float | None = None
    tokens_per_second: float = 0.0
    running: int = 0
    waiting: int = 0
    exit_code: int | None = None
    note: str = ""
    written: float = 0.0  # by the file server's clock; filled in by who reads it


@dataclass(frozen=True)
class Launch:
    """One submission and its renewals: a directory."""

    name: str
    path: Path

    @property
    def script(self) -> Path:
        return self.path / "job.sh"

    @property
    def key(self) -> Path:
        return self.path / "key"

    @property
    def stopped(self) -> bool:
        """Whether `penstock stop` has ended it."""
        return (self.path / "stopped").exists()

    def order(self) -> Order | None:
        """What was asked for; None while it is being written, or when it is not ours to read."""
        return _read(self.path / "launch.json", Order)

    def jobs(self) -> list[str]:
        """The ids of its jobs, in the order of submission."""
        return sorted(_names(self.path / "jobs"), key=int)

    def records(self) -> list[Record]:
        """What its servers say, one for each job that has begun."""
        found = [_read(self.path / "servers" / job, Record) for job in _names(self.path / "servers")]
        return [record for record in found if record is not None]

    def age(self) -> float:
        """Seconds since it was claimed, by the file server's clock. Raises OSError."""
        return server_time(self.path.parent) - self.path.stat().st_mtime

    def log(self, job: str) -> Path:
        """Where a job writes."""
        return self.path / f"{job}.log"

    def add_job(self, job: str) -> None:
        """Remember a job of this launch. Raises OSError."""
        (self.path / "jobs" / job).touch(mode=0o600)

    def publish(self, record: Record) -> None:
        """Put a server's record in place of its last one. Raises OSError."""
        write_private(self.path / "servers" / record.job, msgspec.json.encode(record).decode())

    def mark_stopped(self) -> None:
        """Keep renewals from coming. Raises OSError."""
        (self.path / "stopped").touch(mode=0o600)

    def forget_key(self) -> None:
        """Remove the key that we made, once no server asks for it."""
        with suppress(OSError):
            self.key.unlink()


def root() -> Path:
    """PENSTOCK_JOBS_DIR, or a directory in the home directory, which nodes share; under the scratch directory where
    the site allows no logs of jobs at home."""
    given = os.environ.get("PENSTOCK_JOBS_DIR")
    if given:
        return Path(given).expanduser().absolute()
    site = load_site()
    scratch = os.path.expandvars(site.scratch)
    if not site.home_logs and os.path.isabs(scratch):
        return Path(scratch) / "penstock" / "jobs"
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "penstock" / "jobs"


def name_for(model: str) -> str:
    """A server's name made of its model's: `meta-llama/Llama-3.1-8B` is `llama-3.1-8b`."""
    last = model.partition("@")[0].rstrip("/").rpartition("/")[2].lower()
    plain = re.sub(r"[^a-z0-9._-]+", "-", last).strip("-._")[:40]
    return plain or "model"


def check_name(name: str) -> str:
    """The name, if it can be a directory's. Raises UsageError."""
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} cannot be a server's name.", "Letters, digits, `.`, `_` and `-`; at most 63.")
    return name


def launches(name: str) -> list[Launch]:
    """All launches of a name that are kept, oldest first."""
    directory = root() / check_name(name)
    numbers = sorted((n for n in _names(directory) if _NUMBER.fullmatch(n)), key=int)
    return [Launch(name, directory / number) for number in numbers]


def newest() -> list[Launch]:
    """The last launch of every name."""
    last = (launches(name)[-1:] for name in sorted(_names(root())) if _NAME.fullmatch(name))
    return [launch for found in last for launch in found]


def claim(name: str, after: Launch | None) -> Launch | None:
    """A new launch of a name, whose last one is `after`; None when somebody else was faster.

    Raises EnvironmentFault, ResourceError.
    """
    private_directory(root())
    private_directory(root() / name)
    number = int(after.path.name) + 1 if after is not None else 1
    path = root() / name / f"{number:04d}"
    try:
        path.mkdir(mode=0o700)
    except (FileExistsError, FileNotFoundError):  # somebody was faster, or has just taken a refused one back
        return None
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        (path / "jobs").mkdir(mode=0o700)
        (path / "servers").mkdir(mode=0o700)
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise cannot_write(path, error) from error
    for old in launches(name)[:-KEPT]:
        shutil.rmtree(old.path, ignore_errors=True)
    return Launch(name, path)


def fill(launch: Launch, order: Order, script: str) -> None:
    """Write a launch's files; a key unless the order names one of the user's. Raises EnvironmentFault, ResourceError."""
    try:
        if order.key_file == str(launch.key):
            create_private(launch.key, _new_key() + "\n")
        write_private(launch.path / "launch.json", msgspec.json.encode(order).decode())
        write_private(launch.script, script)
    except OSError as error:
        drop(launch)
        raise cannot_write(launch.path, error) from error


def drop(launch: Launch) -> None:
    """Take a launch back whose job was refused."""
    shutil.rmtree(launch.path, ignore_errors=True)
    with suppress(OSError):
        launch.path.parent.rmdir()  # only when it was the first of its name


def _new_key() -> str:
    key = secrets.token_urlsafe(32)
    while not key[0].isalnum():  # "-" in front would make it a flag on somebody's command line
        key = secrets.token_urlsafe(32)
    return key


def _names(directory: Path) -> list[str]:
    try:
        return [name for name in os.listdir(directory) if not name.startswith(".")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise EnvironmentFault(f"{directory} cannot be read: {error.strerror}.") from error


def _read(file: Path, kind: type[T]) -> T | None:
    """A struct from a JSON file; None when it is missing, torn or of another version."""
    try:
        with file.open("rb") as stream:  # what is opened is fresh; NFS may answer a mere stat from its cache
            found = msgspec.json.decode(stream.read(), type=kind)
            written = os.fstat(stream.fileno()).st_mtime
    except (OSError, msgspec.DecodeError):
        return None
    return msgspec.structs.replace(found, written=written) if isinstance(found, Record) else found
