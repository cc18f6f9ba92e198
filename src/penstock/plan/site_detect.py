"""A site profile from what Slurm says: sinfo for nodes, scontrol for partitions and settings. Text formats only, for
older versions have no `--json`."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from penstock.errors import EnvironmentFault
from penstock.plan.hardware import gpu, known_gpus
from penstock.plan.site import Access, Internet, NodeKind, Partition, Site, duration_seconds

PATIENCE = 30.0  # seconds that a busy controller may take
_NODES = "%R|%D|%c|%m|%f|%G"  # partition, nodes, processors, MiB, features, cards: one line a kind of node
_GRES = re.compile(r"gpu(?::(?P<type>[^:(,]+))?:(?P<count>\d+)")
_SLICE = re.compile(r"(?P<part>\dg\.\d+gb)")


def detect(check_internet: bool = False) -> Site:
    """The profile of the cluster whose Slurm this machine talks to.

    check_internet: try to reach the hub from here (a login node, usually). Raises EnvironmentFault when there is no
    Slurm here, or it does not answer.
    """
    settings = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", _ask("scontrol", "show", "config"), re.MULTILINE))
    kinds, members = _kinds(_ask("sinfo", "--noheader", "--exact", f"--format={_NODES}"))
    described = [_pairs(line) for line in _ask("scontrol", "--oneliner", "show", "partition").splitlines()]
    preempts = settings.get("PreemptType", "preempt/none") != "preempt/none"
    temporary = settings.get("TmpFS", "/tmp")  # noqa: S108
    return Site(
        name=settings.get("ClusterName") or "cluster",
        title=f"Cluster {settings.get('ClusterName', '')}".strip(),
        clusters=tuple(filter(None, [settings.get("ClusterName")])),
        account=_account(),
        local_scratch=tuple(p for p in dict.fromkeys(["$SLURM_TMPDIR", "$TMPDIR", temporary, "/tmp"]) if "%" not in p),  # noqa: S108
        scratch="$SCRATCH" if os.environ.get("SCRATCH") else "$HOME",
        internet=Internet(login=_internet() if check_internet else "unknown", proxy=_proxy()),
        nodes=kinds,
        partitions={
            p["PartitionName"]: _partition(p, members.get(p["PartitionName"], ()), described, preempts)
            for p in described
            if p.get("PartitionName")
        },
    )


def _ask(program: str, *arguments: str) -> str:
    if shutil.which(program) is None:
        raise EnvironmentFault(
            f"There is no Slurm here: the command {program} is missing.",
            "",
            "Run this on a login node of the cluster, or take a shipped profile: --site NAME.",
        )
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFault(f"Slurm does not answer: {program}: {error}.", "", "Try again later.") from None
    if done.returncode != 0:
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise EnvironmentFault(f"Slurm does not answer: {program}: {words[:160]}", "", "`sinfo` shows what is wrong.")
    return done.stdout


def _pairs(line: str) -> dict[str, str]:
    """`Key=value Key=value` as scontrol prints it."""
    return dict(re.findall(r"(\w+)=(\S*)", line))


@dataclass(frozen=True)
class _Line:
    """One line of sinfo: nodes of one kind in one partition."""

    partition: str
    nodes: int
    kind: NodeKind


def _lines(text: str) -> Iterable[_Line]:
    for line in text.splitlines():
        partition, nodes, cpus, memory, features, gres = line.split("|", 5)
        for typed, count in [(m["type"], int(m["count"])) for m in _GRES.finditer(gres)] or [("", 0)]:
            yield _Line(
                partition,
                int(nodes),
                NodeKind(
                    cpus=int(cpus.rstrip("+")),
                    memory_gib=int(memory.rstrip("+")) // 102.4 / 10,
                    gpus=count,
                    gpu=name_of(typed or "", features),
                    gres=typed or "",
                ),
            )


def _kinds(text: str) -> tuple[dict[str, NodeKind], dict[str, list[str]]]:
    """The distinct kinds of nodes, each with a name, and the names in each partition."""
    found: dict[NodeKind, tuple[str, int]] = {}
    members: dict[str, list[str]] = {}
    for line in _lines(text):
        if line.kind not in found:
            stem = (line.kind.gres or line.kind.gpu or "gpu") if line.kind.gpus else "cpu"
            taken = {name for name, _ in found.values()}
            name = next(n for n in (stem, *(f"{stem}-{i}" for i in range(2, 10_000))) if n not in taken)
            found[line.kind] = (name, 0)
        name, count = found[line.kind]
        found[line.kind] = (name, max(count, line.nodes))
        members.setdefault(line.partition, []).append(name)
    named = {}
    for kind, (name, count) in found.items():
        named[name] = NodeKind(
            count=count, cpus=kind.cpus, memory_gib=kind.memory_gib, gpus=kind.gpus, gpu=kind.gpu, gres=kind.gres
        )
    return named, members


def name_of(gres: str, features: str = "") -> str:
    """Penstock's name of a card from Slurm's type and the nodes' features; empty when nothing fits.

    Of several sizes the one that the words name is taken, else the smallest: a plan should not promise too much.
    """
    words = re.sub(r"[^a-z0-9.]+", " ", f"{gres} {features}".lower())
    cut = _SLICE.search(words)
    fitting = []
    for name in known_gpus():
        card, colon, part = name.partition(":")
        kind, _, size = card.partition("-")
        spelled = any(
            re.search(rf"(?<![a-z0-9]){kind}(?![0-9])", text) for text in (words, words.replace("rtx ", "rtx"))
        )
        if not spelled or bool(colon) != bool(cut):
            continue
        if cut and part != cut["part"]:
            continue
        said = bool(size) and re.search(rf"(?<!\d){size}(?: ?gb?|q)?(?![a-z0-9])", words) is not None
        fitting.append((not said and not cut, gpu(name).memory, name))
    larger = re.search(r"a100l(?:\.(\d))?", words)  # Mila's word for 80 GB, with the sevenths of a slice
    if larger and not cut:
        cuts = [name for name in gpu("a100-80").slices if larger[1] and name.startswith(f"a100-80:{larger[1]}g")]
        return cuts[-1] if cuts else "a100-80"
    return min(fitting)[2] if fitting else ""


def _partition(said: dict[str, str], nodes: Iterable[str], every: list[dict[str, str]], preempts: bool) -> Partition:
    limit = said.get("MaxTime", "")
    own = set(_hosts(said))
    above = any(
        int(other.get("PriorityTier", 1)) > int(said.get("PriorityTier", 1)) and own & set(_hosts(other))
        for other in every
    )
    most = said.get("MaxMemPerNode", "")
    return Partition(
        name=said["PartitionName"],
        nodes=tuple(dict.fromkeys(nodes)),
        time_limit=limit if duration_seconds(limit) is not None else "",
        max_cpus=int(said["MaxCPUsPerNode"]) if said.get("MaxCPUsPerNode", "").isdigit() else 0,
        max_memory_gib=int(most) // 102.4 / 10 if most.isdigit() else 0,
        preempted=preempts and above and said.get("PreemptMode", "OFF") != "OFF",
        default=said.get("Default") == "YES",
    )


def _hosts(said: dict[str, str]) -> list[str]:
    """Pieces of a node list, good enough to see whether two partitions share nodes (`n[1-2]` -> n1, n2)."""
    hosts: list[str] = []
    for stem, inside, plain in re.findall(r"([^,\[]+)\[([^\]]+)\]|([^,\[\]]+)", said.get("Nodes", "")):
        if plain:
            hosts.append(plain)
        for piece in inside.split(",") if inside else ():
            low, _, high = piece.partition("-")
            if low.isdigit() and (high or low).isdigit() and int(high or low) - int(low) < 100_000:
                hosts += [f"{stem}{number:0{len(low)}d}" for number in range(int(low), int(high or low) + 1)]
    return hosts


def _account() -> str:
    """The user's default account, where Slurm keeps accounts."""
    user = os.environ.get("USER", "")
    if not user or shutil.which("sacctmgr") is None:
        return ""
    try:
        text = _ask("sacctmgr", "--noheader", "--parsable2", "show", "user", user, "format=DefaultAccount")
    except EnvironmentFault:  # no accounting
        return ""
    return (text.split() or [""])[0]


def _proxy() -> str:
    """The proxy that the environment names, without a password that may be in it."""
    value = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY") or ""
    parts = urlsplit(value)
    return value.replace(f"{parts.username}:{parts.password}@", "") if parts.password else value


def _internet() -> Access:
    """Whether the hub can be reached from here."""
    if _proxy():
        return "proxy"
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        with socket.create_connection((host.hostname or "", host.port or 443), timeout=3):
            return "yes"
    except OSError:
        return "no"


def to_toml(site: Site) -> str:
    """A profile as a file with explanations, for `penstock site detect` and `show`."""
    lines = [f"# {site.title or site.name}", *(f"# {line}" for line in site.notes.splitlines())]
    plain = {
        name: getattr(site, name)
        for name in site.__struct_fields__
        if name not in ("internet", "ports", "nodes", "partitions", "file")
    }
    lines += [f"{name} = {_value(value)}" for name, value in plain.items()]
    for name, table in (("internet", site.internet), ("ports", site.ports)):
        lines += ["", f"[{name}]", *(f"{key} = {_value(getattr(table, key))}" for key in table.__struct_fields__)]
    for group, tables in (("nodes", site.nodes), ("partitions", site.partitions)):
        for name, item in tables.items():
            lines += ["", f"[{group}.{_key(name)}]"]
            for key in item.__struct_fields__:
                value = getattr(item, key)
                if key != "name" and value not in (0, "", (), False):
                    lines.append(f"{key} = {_value(value)}")
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
