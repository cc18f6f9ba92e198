"""`penstock farm worker`: one worker of a farm, as jobs run it; and one life of it, as its supervisor runs it."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from penstock.cli.options import FiniteFloat, Whole

if TYPE_CHECKING:
    from penstock.batch.farm.manifest import Manifest, ModelCopy, Profile
    from penstock.batch.farm.spool import Spool
    from penstock.batch.farm.worker import Generate
    from penstock.batch.local import Progress
    from penstock.batch.rows import Row

farm_argument = click.argument("folder", metavar="FARM", type=click.Path(path_type=Path, file_okay=False))


@click.command(short_help="One worker, as the jobs of a farm run it.")
@farm_argument
@click.option("--partition", default="local", show_default=True, metavar="NAME", help="Whose profile it takes.")
@click.option("--settings", default="", metavar="NAME=VALUE,...", help="Instead of what that profile says.")
@click.option("--rank", type=Whole(0), default=0, help="Of several workers of one job.")
@click.option("--until", type=FiniteFloat(0), help="When its time is over, in seconds since 1970.  [default: Slurm's]")
@click.option("--staged", metavar="DIR", help="A copy of the model on this node.")
@click.option("--staging-seconds", type=FiniteFloat(0), default=0.0, help="How long that took.")
@click.option("--cores", metavar="LIST", hidden=True, help="Numbers of the cores that it may use.")
@click.option("--life", metavar="NAME", hidden=True, help="Be this life, instead of the supervisor of lives.")
def worker(
    folder: Path,
    partition: str,
    settings: str,
    rank: int,
    until: float | None,
    staged: str | None,
    staging_seconds: float,
    cores: str | None,
    life: str | None,
) -> int:
    """Work for a farm until there is nothing left to do. It may be started anywhere, at any time, any number of times.

    USR1 and TERM make it hand back what it holds and leave. Exit codes: 0 nothing left, 6 work left (start it again).
    """
    from penstock.batch.farm.manifest import parse_settings
    from penstock.batch.farm.spool import Spool

    spool = Spool(folder.resolve())
    spool.manifest = spool.manifest.adjusted({partition: parse_settings(settings)})
    rank = int(os.environ.get("SLURM_PROCID", rank))
    if life is None:
        until = until if until is not None else _end_of_job()
        more = [] if until is None else ["--until", f"{until:.0f}"]
        if staged is not None:
            more += ["--staged", staged, "--staging-seconds", f"{staging_seconds:g}"]
        from penstock.batch.farm.local import supervise

        return supervise(spool, partition, rank, more)
    if cores is not None:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    return _live(spool, life, partition, rank, until, staged, staging_seconds)


def _live(
    spool: Spool,
    life: str,
    partition: str,
    rank: int,
    until: float | None,
    staged: str | None,
    staging_seconds: float,
) -> int:
    """Be one life."""
    from penstock.batch.farm.life import Engine, follow_parent, live
    from penstock.batch.farm.place import here
    from penstock.cluster.workers import running_jobs

    follow_parent()
    deadline = None if until is None else time.monotonic() + until - time.time()
    engine = Engine(staged=None if staged is None else Path(staged), staging_seconds=staging_seconds, load=_load)
    code = live(spool, life, here(rank, partition), engine, running_jobs, deadline)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of the engine's libraries have nothing to say any more


def _load(manifest: Manifest, model: ModelCopy, profile: Profile) -> Generate:
    """The engine of this process, as the partition's profile wants it."""
    from penstock.batch.local import generate_rows
    from penstock.batch.prompts import Prompter
    from penstock.cli.engine import start_engine
    from penstock.hub.snapshot import Snapshot
    from penstock.text.tokenizer import load_tokenizer

    path = Path(model.path)
    engine = start_engine(Snapshot(path, model.name, None, model.trusted), profile.engine_options())
    prompter = Prompter(load_tokenizer(path))
    window = manifest.shard_rows * max(1, manifest.parameters.n or 1)

    def generate(rows: Iterable[Row]) -> Iterator[Progress]:
        return generate_rows(engine, prompter, rows, manifest.parameters, window)

    return generate


def _end_of_job() -> float | None:
    """When Slurm will end this job, in seconds since 1970 by this node's clock, which need not be Slurm's."""
    begun, end = (os.environ.get(f"SLURM_JOB_{name}_TIME", "") for name in ("START", "END"))
    if begun.isdecimal() and end.isdecimal():
        return time.time() + int(end) - int(begun)  # the job has just begun
    from penstock.batch.farm.place import job_id
    from penstock.cluster import slurm

    job = job_id()
    found = slurm.one(job) if job is not None and slurm.available("squeue") else None
    return None if found is None or found.left is None else time.time() + found.left
