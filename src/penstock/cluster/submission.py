"""From what a user asks for to a job in Slurm's queue."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from penstock.cluster import fleet, registry, slurm
from penstock.cluster.registry import Launch, Order
from penstock.cluster.script import Resources, Service, script, seconds_of
from penstock.errors import UsageError

LEAD = 1800  # seconds, at most, that a successor is started before the end of the job before it


@dataclass(frozen=True)
class Renewal:
    """Whether successors take over before the time limit. count: that many, handed in now; None: each job hands in the
    next one when it is ready."""

    count: int | None = None


@dataclass(frozen=True)
class Submitted:
    """A launch in the queue. jobs: the first and, with a counted renewal, its successors."""

    launch: Launch
    jobs: list[str]


def plan_renewal(renewal: Renewal | None, resources: Resources) -> int | None:
    """Minutes from the start of a job to the start of its successor. Raises UsageError."""
    if renewal is None:
        return None
    if resources.time is None:
        raise UsageError(
            "--renew needs --time.", "The successor starts some time before the end.", "Add --time 3:00:00"
        )
    limit = seconds_of(resources.time)
    if limit < 120:
        raise UsageError("--renew needs a --time of at least two minutes.", "Slurm counts the delay in minutes.")
    return max(1, (limit - min(LEAD, limit // 4)) // 60)


def draft(model: str, resources: Resources, service: Service, name: str | None) -> str:
    """The script as it would be submitted, written nowhere."""
    launch = Launch(name or registry.name_for(model), registry.root() / (name or registry.name_for(model)) / "0001")
    return script(launch, resources, _with_key(service, launch))


def submit(name: str | None, resources: Resources, service: Service, renewal: Renewal | None) -> Submitted:
    """Write the script, hand it in, remember the job. Raises PenstockError; then nothing is left behind."""
    minutes = plan_renewal(renewal, resources)
    if not slurm.available("sbatch"):
        raise slurm.missing("sbatch")
    launch = fleet.reserve(name, service.model, fleet.ask_slurm())
    service = _with_key(service, launch)
    order = Order(service.model, service.key_file, minutes, service.drain_seconds, service.stage)
    try:
        registry.fill(launch, order, script(launch, resources, service))
        jobs = [slurm.submit(launch.script)]
    except BaseException:
        registry.drop(launch)
        raise
    launch.add_job(jobs[0])
    for _ in range(renewal.count or 0 if renewal is not None else 0):
        jobs.append(slurm.submit(launch.script, f"--dependency=after:{jobs[-1]}+{minutes}"))
        launch.add_job(jobs[-1])
    return Submitted(launch, jobs)


def gate(launch: Launch, python: str, flags: tuple[str, ...] = ()) -> str:
    """A small job that ends well when the server is ready; jobs of others wait for it with `afterok:ID`.

    It waits in the queue until the server's job has begun. Raises PenstockError.
    """
    first = launch.jobs()[0]
    file = Path(launch.path) / "ready.sh"
    if not file.exists():
        from penstock.cluster.files import write_private
        from penstock.cluster.script import gate_script

        write_private(file, gate_script(launch, python))
    return slurm.submit(file, f"--dependency=after:{first}", *flags)


def _with_key(service: Service, launch: Launch) -> Service:
    """An empty key file's name stands for a key of the launch's own."""
    return replace(service, key_file=str(launch.key)) if service.key_file == "" else service
