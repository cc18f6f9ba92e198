"""Site profiles: what a cluster has and allows, as a TOML file that people can read and correct.

`load_site` finds the profile of this machine; every command that deals with Slurm, staging or the network asks it.
The file has the same names as the structs below; `penstock site show` prints one, `penstock site detect` writes one.
"""

from __future__ import annotations

import fnmatch
import os
import re
import socket
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from penstock.errors import EnvironmentFault, UsageError

GENERIC = "generic"
SYSTEM_FILE = Path("/etc/penstock/site.toml")
_SHIPPED = Path(__file__).parent / "sites"
_DURATION = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
Count = Annotated[int, Meta(ge=0)]
Access = Literal["yes", "no", "proxy", "unknown"]


class NodeKind(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Nodes of one kind.

    memory_gib: what jobs of one node may use together. gpu: Penstock's name of the card or MIG slice (`penstock plan
    --gpus-known`). gres: its type in Slurm's words (`a100l` of `--gres=gpu:a100l:2`), empty when cards have no type.
    constraint: the `--constraint` that selects these nodes.
    """

    count: Count = 0
    cpus: Count = 0
    memory_gib: Annotated[float, Meta(ge=0)] = 0
    gpus: Count = 0
    gpu: str = ""
    gres: str = ""
    constraint: str = ""


class Partition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A partition; the name is its key in the file. time_limit: Slurm's words, empty for none.

    nodes: the kinds of nodes in it. max_*: what one job may ask for, 0 for as much as a node has. preempted: whether
    jobs of other partitions may push its jobs off. default: used when nothing is said.
    """

    name: str = ""
    nodes: tuple[str, ...] = ()
    time_limit: str = ""
    max_cpus: Count = 0
    max_memory_gib: Annotated[float, Meta(ge=0)] = 0
    max_gpus: Count = 0
    preempted: bool = False
    default: bool = False

    @property
    def seconds(self) -> int | None:
        """The time limit in seconds, None for no limit."""
        return duration_seconds(self.time_limit) if self.time_limit else None


class Internet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether login and compute nodes reach the internet; `proxy`: only through the address in `proxy`."""

    login: Access = "unknown"
    compute: Access = "unknown"
    proxy: str = ""


class Ports(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a job's server listens: `base` + the last four digits of the job id first, then any free port in
    low..high (0: whatever the system gives). unix: servers of this site prefer a unix socket."""

    base: Count = 10000
    low: Count = 0
    high: Count = 0
    unix: bool = False

    def first(self, job_id: int) -> int:
        """The port that a job tries first."""
        return self.base + job_id % 10000


class Site(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One cluster (or one machine without Slurm: then there are no partitions).

    title, notes: for people. hosts: patterns of host names, clusters: values of SLURM_CLUSTER_NAME or CC_CLUSTER, by
    which a shipped profile recognizes its site. scratch: the user's folder for large files on the shared file system;
    models: folders where the site keeps models for everyone; local_scratch: per-node storage, the first that exists
    is used; ram_disk: a node's memory as files (`$VARIABLES` are those of a job, so they are expanded there).
    disk_gb_s: reading speed of the shared file system, 0 for unknown. modules: lines for a job script before anything
    runs. account: the default of `--account`; account_required: whether jobs without one are refused. gpu_flag: how
    cards are asked for. sbatch: further options for every job, without `#SBATCH`. home_logs: whether jobs may write
    their logs under the home folder. ssh: the name of the login node for tunnels from outside.
    """

    name: str = GENERIC
    title: str = ""
    notes: str = ""
    hosts: tuple[str, ...] = ()
    clusters: tuple[str, ...] = ()
    ssh: str = ""
    account: str = ""
    account_required: bool = False
    scratch: str = "$SCRATCH"
    models: tuple[str, ...] = ()
    local_scratch: tuple[str, ...] = ("$SLURM_TMPDIR", "$TMPDIR", "/tmp")  # noqa: S108
    ram_disk: str = "/dev/shm"  # noqa: S108
    disk_gb_s: Annotated[float, Meta(ge=0)] = 0.0
    modules: tuple[str, ...] = ()
    gpu_flag: Literal["gres", "gpus-per-node"] = "gres"
    sbatch: tuple[str, ...] = ()
    home_logs: bool = True
    internet: Internet = Internet()
    ports: Ports = Ports()
    nodes: dict[str, NodeKind] = {}
    partitions: dict[str, Partition] = {}
    file: str = ""

    def kinds(self, partition: str) -> list[NodeKind]:
        """The kinds of nodes of a partition."""
        return [self.nodes[name] for name in self.partitions[partition].nodes]

    def default_partition(self) -> Partition | None:
        """The partition of jobs that name none, if the profile says so."""
        return next((p for p in self.partitions.values() if p.default), None)

    def gpu_option(self, kind: NodeKind, count: int) -> str:
        """The sbatch option that asks for `count` cards of a kind of node."""
        typed = f"{kind.gres}:{count}" if kind.gres else str(count)
        return f"--gres=gpu:{typed}" if self.gpu_flag == "gres" else f"--gpus-per-node={typed}"


def load_site(name_or_path: str | None = None) -> Site:
    """The profile to use: the argument (a shipped name or a file), $PENSTOCK_SITE, the user's file, the system's file,
    a shipped profile that recognizes this machine, what Slurm tells here, else the generic one.

    Raises UsageError for an unknown name and for a file that is not a profile, EnvironmentFault for one that cannot
    be read.
    """
    given = name_or_path or os.environ.get("PENSTOCK_SITE")
    if given:
        return _named(given)
    for file in (user_file(), SYSTEM_FILE):
        if file.is_file():
            return read_site(file)
    return recognize() or read_site(_SHIPPED / f"{GENERIC}.toml")


def user_file() -> Path:
    """The user's own profile: what `penstock site detect` writes and every command reads."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "penstock" / "site.toml"


def shipped() -> list[str]:
    """The names of the profiles that come with Penstock."""
    return sorted(file.stem for file in _SHIPPED.glob("*.toml"))


def recognize() -> Site | None:
    """The shipped profile whose cluster or host name is this machine's."""
    cluster = {os.environ.get("SLURM_CLUSTER_NAME", ""), os.environ.get("CC_CLUSTER", "")} - {""}
    host = socket.gethostname()
    for name in shipped():
        site = read_site(_SHIPPED / f"{name}.toml")
        if cluster & set(site.clusters) or any(fnmatch.fnmatchcase(host, pattern) for pattern in site.hosts):
            return site
    return None


def read_site(file: Path) -> Site:
    """Parse and check one profile. Raises UsageError, EnvironmentFault."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EnvironmentFault(f"The site profile {file} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"The site profile {file} is not TOML.", f"{error}.") from None
    return parse_site(table, file)


def parse_site(table: dict[str, Any], file: Path) -> Site:
    """Check a profile's table. Raises UsageError that names the place in the file."""
    for name, partition in _tables(table, "partitions").items():
        partition["name"] = name
    try:
        site = msgspec.convert({**table, "file": str(file)}, Site)
    except msgspec.ValidationError as error:
        raise _wrong(file, f"{error}.") from None
    for name, checked in site.partitions.items():
        unknown = [kind for kind in checked.nodes if kind not in site.nodes]
        if unknown:
            raise _wrong(file, f"Partition {name!r} names nodes {unknown[0]!r}, which [nodes] lacks.")
        if checked.time_limit and duration_seconds(checked.time_limit) is None:
            raise _wrong(file, f"Partition {name!r}: {checked.time_limit!r} is not a time like 2-00:00:00.")
    return site


def duration_seconds(text: str) -> int | None:
    """Slurm's times: MINUTES, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None for anything else (`UNLIMITED` too)."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, [*numbers, 0][:2]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def _named(given: str) -> Site:
    if "/" in given or given.endswith(".toml"):
        return read_site(Path(given).expanduser())
    if given not in shipped():
        raise UsageError(
            f"There is no site profile {given[:60]!r}.",
            f"Shipped: {', '.join(shipped())}.",
            "Give one of these, or a file; `penstock site detect` writes one for the cluster that you are on.",
        )
    return read_site(_SHIPPED / f"{given}.toml")


def _tables(table: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    value = table.get(key)
    return {k: v for k, v in value.items() if isinstance(v, dict)} if isinstance(value, dict) else {}


def _wrong(file: Path, why: str) -> UsageError:
    return UsageError(f"The site profile {file} is wrong.", why, "`penstock site show generic` prints a valid one.")
