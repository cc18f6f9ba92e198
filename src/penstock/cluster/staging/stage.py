"""Staging as one operation: look, choose a place, copy, check, commit."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.cluster import fleet
from penstock.cluster.staging import strategies
from penstock.cluster.staging.crew import Answers, Crew
from penstock.cluster.staging.manifest import Manifest, read_manifest
from penstock.cluster.staging.strategies import Timing
from penstock.errors import EnvironmentFault, ResourceError
from penstock.plan.memory import human
from penstock.plan.site import Site

LOCK_SECONDS = 3600.0  # that another job may take to stage the same model


@dataclass(frozen=True)
class Allocation:
    """The job that we are in."""

    job: str
    nodes: int


@dataclass(frozen=True)
class Staged:
    """Where the model lies on every node. timing: None when it was there already."""

    path: Path
    nodes: list[str]
    timing: Timing | None
    seconds: float
    check_seconds: float


def allocation() -> Allocation:
    """The job of this process. Raises EnvironmentFault outside of one."""
    job, nodes = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_NUM_NODES") or os.environ.get("SLURM_NNODES")
    if not job:
        raise EnvironmentFault(
            "Staging brings a model to the nodes of a job, and this is not one.",
            hint="Use it in a batch script, or after `salloc --nodes=N`. A server stages itself: penstock submit --stage",
        )
    return Allocation(job, int(nodes or 1))


def stage(
    folder: Path, site: Site, where: str, strategy: str | None, job: Allocation, say: Callable[[str], None]
) -> Staged:
    """Bring a model folder to every node of the job. where: ram, scratch or auto; strategy: None to measure.

    Raises PenstockError; then nothing is left behind.
    """
    began = time.monotonic()
    manifest = read_manifest(folder)
    with Crew(job.job, job.nodes) as crew:
        offers = crew.ask("look", places=places(site, where), key=manifest.key, total=manifest.total)
        place = choose(offers, manifest, say)
        missing = _locked(crew, place, manifest, say)
        path = Path(offers[crew.nodes[0]]["offers"][place.index]["path"]) / f"penstock-{os.getuid()}" / manifest.key
        if not missing:
            crew.ask("commit", who=[], key=manifest.key)
            return Staged(path, crew.nodes, None, time.monotonic() - began, 0.0)
        say(f"{human(manifest.total)} to {place.name} of {len(missing)} nodes")
        try:
            ground = strategies.prepared(crew, manifest, missing, f"{path}.part")
            known = strategies.candidates(len(missing), all_nodes=len(missing) == len(crew.nodes))
            copying = time.monotonic()
            if strategy is not None:
                timing = strategies.bring(strategies.named(strategy, known), ground, 0, len(manifest.pieces()))
            else:
                timing = strategies.bring_all(ground, known, say)
            copied = time.monotonic()
            strategies.check(ground)
        except BaseException:
            crew.ask("drop", key=manifest.key, who=missing)
            raise
        crew.ask("commit", who=missing, key=manifest.key)
        whole = Timing(timing.strategy, copied - copying, manifest.total)
        return Staged(path, crew.nodes, whole, copied - began, time.monotonic() - copied)


@dataclass(frozen=True)
class Place:
    """A place that every node has. name: as the site profile spells it; index: in the list of places."""

    name: str
    index: int


def places(site: Site, where: str) -> list[str]:
    """Where a model may be staged, the best first: the RAM disk, then local disks."""
    disk = list(dict.fromkeys(site.local_scratch))
    return {"ram": [site.ram_disk], "scratch": disk}.get(where, [site.ram_disk, *disk])


def choose(offers: Answers, manifest: Manifest, say: Callable[[str], None]) -> Place:
    """The first place that has the model or room for it on all nodes. Raises ResourceError with the sums."""
    count = len(next(iter(offers.values()))["offers"])
    reasons = []
    for index in range(count):
        here = {node: answer["offers"][index] for node, answer in offers.items()}
        name = str(next(iter(here.values()))["place"])
        bad = {node: offer for node, offer in here.items() if not offer["staged"] and not offer.get("fits")}
        if not bad:
            for reason in reasons:
                say(f"not {reason}")
            return Place(name, index)
        node, offer = next(iter(bad.items()))
        why = offer["why"] or f"has {human(offer['free'])} free"
        reasons.append(f"{name}: it {why} on {node}")
    raise ResourceError(
        f"The model has {human(manifest.total)} and fits nowhere on the nodes.",
        "; ".join(reasons)[:400] + ".",
        "Ask for more memory (--mem) or local disk (--tmp), remove old copies (penstock stage --clean), or serve from "
        "the shared file system.",
    )


def _locked(crew: Crew, place: Place, manifest: Manifest, say: Callable[[str], None]) -> list[str]:
    """Hold the lock of this model on all nodes; returns those that lack it. Raises EnvironmentFault."""
    end, told = time.monotonic() + LOCK_SECONDS, False
    while True:
        answers = crew.ask("lock", place=place.name, key=manifest.key)
        if all(answer["locked"] for answer in answers.values()):
            return [node for node in crew.nodes if answers[node]["staged"] is None]
        crew.ask("unlock", key=manifest.key)  # holding some while waiting for others is how two jobs would wait forever
        if time.monotonic() > end:
            raise EnvironmentFault("Another job of yours has been staging this model for an hour.")
        if not told:
            say("another job of yours is staging this model on a node: waiting")
            told = True
        time.sleep(random.uniform(0.3, 1.0))  # noqa: S311


def clean(folder: Path | None, site: Site, job: Allocation) -> tuple[int, int]:
    """Remove a staged model (None: all of this user's) from the job's nodes. Returns how many went, and how many
    stayed because a living job uses them."""
    key = read_manifest(folder).key if folder is not None else None
    jobs = fleet.ask_slurm()
    living = None if jobs is None else [other for other, found in jobs.items() if found.alive and other != job.job]
    with Crew(job.job, job.nodes) as crew:
        answers = crew.ask("clean", places=places(site, "auto"), key=key, living=living)
    return sum(a["removed"] for a in answers.values()), sum(a["kept"] for a in answers.values())


def measure(
    folder: Path, site: Site, where: str, job: Allocation, say: Callable[[str], None], limit: int
) -> list[tuple[int, list[Timing]]]:
    """Time every way for 1, 2, 4, ... nodes on the first `limit` bytes of a model. Leaves nothing behind."""
    manifest = read_manifest(folder)
    pieces = manifest.pieces()
    last = next((i for i in range(1, len(pieces)) if sum(p.length for p in pieces[:i]) >= limit), len(pieces))
    with Crew(job.job, job.nodes) as everybody:
        nodes = everybody.nodes
        offers = everybody.ask("look", places=places(site, where), key=manifest.key, total=manifest.total)
    place = choose(offers, manifest, say)
    path = Path(offers[nodes[0]]["offers"][place.index]["path"]) / f"penstock-{os.getuid()}" / f"{manifest.key}.part"
    counts = sorted({2**power for power in range(8) if 2**power < len(nodes)} | {len(nodes)})
    table = []
    for count in counts:
        with Crew(job.job, count, nodes[:count]) as crew:
            table.append((count, _time_all(crew, place, manifest, str(path), last, say)))
    return table


def _time_all(
    crew: Crew, place: Place, manifest: Manifest, part: str, last: int, say: Callable[[str], None]
) -> list[Timing]:
    _locked(crew, place, manifest, say)
    timings = []
    try:
        for strategy in strategies.candidates(len(crew.nodes), all_nodes=True):
            ground = strategies.prepared(crew, manifest, crew.nodes, part)
            try:
                timing = strategies.bring(strategy, ground, 0, last)
                strategies.check(ground) if last == len(manifest.pieces()) else None
            except strategies.LeaderFailed as error:
                timing = Timing(strategy, 0.0, 0, str(error).splitlines()[0])
            timings.append(timing)
    finally:
        crew.ask("drop", key=manifest.key, who=crew.nodes)
    return timings


def parts(nodes: Sequence[str]) -> str:
    """Names of nodes for people."""
    return ", ".join(nodes) if len(nodes) <= 6 else f"{nodes[0]} .. {nodes[-1]} ({len(nodes)})"
