"""A farm's workers on Slurm: the job of each partition, and those that are missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from penstock.batch.farm.prepare import Draft
from penstock.batch.farm.spool import Spool
from penstock.cluster.script import Resources, seconds_of
from penstock.cluster.workers import Submission, Workers, again, queue, submissions, submit
from penstock.errors import EnvironmentFault
from penstock.plan.site import load_site

STAGED_FROM = 1e9  # bytes of weights from which on a model is copied to each node


def shapes(
    spool: Spool | Draft, counts: Mapping[str, int], common: Resources, stage: bool | None, site: str | None
) -> list[Workers]:
    """The jobs of each partition: its profile over what is common to all. stage: None decides by the model's size."""
    known = load_site(site)
    found = []
    for partition, count in counts.items():
        profile = spool.manifest.profile(partition)
        gpus = common.gpus if profile.gpus is None else str(profile.gpus)
        resources = replace(
            common,
            partition=partition,
            account=profile.account or common.account or known.account or None,
            qos=profile.qos or common.qos,
            time=profile.time or common.time,
            gpus=None if gpus == "0" else gpus,
            cpus=profile.cpus or common.cpus,
            mem=profile.mem or common.mem,
            constraint=profile.constraint or common.constraint,
            gpu_flag=known.gpu_flag,
        )
        if resources.time is not None:
            seconds_of(resources.time)
        model = Path(spool.manifest.model(partition).path)
        large = sum(file.stat().st_size for file in model.glob("*.safetensors")) >= STAGED_FROM
        staged = str(model) if (large if stage is None else stage) else None
        found.append(
            Workers(
                folder=spool.folder,
                count=count,
                resources=resources,
                settings=profile.settings(),
                model=staged,
                modules=known.modules,
            )
        )
    return found


def submit_all(workers: list[Workers], times: int = 1) -> Iterator[Submission]:
    """Hand every job in and tell of it at once, for a later one may be refused; times: so often, each when the one
    before it is over."""
    for shape in workers:
        after = None
        for _ in range(times):
            entry = submit(shape, after)
            after = entry.job
            yield entry


def resubmit(spool: Spool, workers: int | None = None) -> list[Submission]:
    """Hand in again the workers that neither run nor wait. workers: so many a partition, instead of as before."""
    known = submissions(spool.folder)
    jobs = queue(known)
    if jobs is None:
        raise EnvironmentFault(
            "Slurm does not say which workers of this farm run.", "", "Try again on a login node, in a minute."
        )
    started = []
    for partition, latest in {entry.partition: entry for entry in known}.items():
        before = max(entry.workers for entry in known if entry.partition == partition)
        missing = (workers or before) - jobs.running.get(partition, 0) - jobs.waiting.get(partition, 0)
        if missing > 0:
            started.append(again(spool.folder, latest, missing))
    return started
