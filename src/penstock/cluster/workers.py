"""A farm's workers as jobs: one array of one-node jobs a partition, each of which starts when a node is free."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from penstock import __version__
from penstock.cluster import slurm, words
from penstock.cluster.files import cannot_write, create_private, server_time
from penstock.cluster.script import CARRIED, Resources, seconds_of
from penstock.errors import EnvironmentFault, PenstockError, UsageError

MAX_WORKERS = 1000  # elements of an array; most sites allow 1001
WARNING = 120  # seconds before the time limit that workers are told
WORK_LEFT = 6  # exit code of a worker that could be started again
MAX_RESTARTS = 100  # of a job by itself


@dataclass(frozen=True)
class Workers:
    """Workers of one shape. folder: of the farm; settings: `name=value,...`, how they run it; model: to be staged on
    the nodes, None to read it where it is."""

    folder: Path
    count: int
    resources: Resources
    settings: str = ""
    model: str | None = None
    modules: tuple[str, ...] = ()

    @property
    def partition(self) -> str:
        return self.resources.partition or ""


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """What was submitted, as it is kept in the farm's folder. submitted: by the file server's clock."""

    job: str
    partition: str
    workers: int
    submitted: float
    script: str


def script(workers: Workers) -> str:
    """The text of the batch script."""
    time = workers.resources.time
    warning = WARNING if time is None else max(5, min(WARNING, seconds_of(time) // 4))
    flags = [
        f"--job-name=farm-{workers.folder.name}",
        f"--output={workers.folder}/logs/%A_%a.log",
        "--open-mode=append",
        f"--chdir={workers.folder}",
        *workers.resources.flags(),
        f"--array=0-{workers.count - 1}",
        "--nodes=1",
        "--ntasks=1",
        "--requeue",
        f"--signal=USR1@{warning}",
        "--export=NONE",
    ]
    python = f"{shlex.quote(sys.executable)} -m penstock.cli.main"
    worker = [
        f"{python} farm worker {shlex.quote(str(workers.folder))}",
        f"--partition {shlex.quote(workers.partition)}",
        *([f"--settings {shlex.quote(workers.settings)}"] if workers.settings else []),
    ]
    lines = [
        "#!/bin/bash",
        f"# Workers of the farm in {_comment(str(workers.folder))}. Written by Penstock {__version__}.",
        "# See how it goes with `penstock farm status`, end it with `penstock farm cancel`.",
        *(f"#SBATCH {flag}" for flag in flags),
        "",
        "# Nothing of the submitting shell comes along (--export=NONE), but steps shall see what is set here.",
        "export SLURM_EXPORT_ENV=ALL",
        "umask 077",
        *(f"export {name}={shlex.quote(os.environ[name])}" for name in CARRIED if os.environ.get(name)),
        *workers.modules,
        "",
    ]
    if workers.model is not None:
        model = shlex.quote(workers.model)
        lines += [
            "# The model comes to this node once; jobs that find it there use it, and the last one removes it.",
            "began=${EPOCHREALTIME/[.,]/}",  # microseconds
            f"if staged=$({python} stage {model}); then",
            '    took="$((${EPOCHREALTIME/[.,]/} - began))e-6"',
            '    set -- --staged "$staged" --staging-seconds "$took"',
            "fi",
            f"trap '{python} stage --clean {model}' EXIT",
            "",
        ]
    lines += [
        "# The signal before the time limit reaches the step only. A worker that had to go, with work left,",
        f"# ends with {WORK_LEFT}: then this job comes back, if the site lets nodes say so.",
        f'srun --ntasks=1 {" ".join(worker)} "$@"',
        "code=$?",
        f'if [ $code = {WORK_LEFT} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MAX_RESTARTS} ]; then',
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"


def submit(workers: Workers, after: str | None = None) -> Submission:
    """Hand the workers in; after: only when this job is over. Raises PenstockError."""
    if not 1 <= workers.count <= MAX_WORKERS:
        raise UsageError(f"--workers must be at least 1 and at most {MAX_WORKERS} a partition. Given: {workers.count}")
    folder = workers.folder / "jobs"
    try:
        number = 1 + sum(name.suffix == ".sh" for name in folder.iterdir())
        while True:
            file = folder / f"{workers.partition}-{number}.sh"
            try:
                create_private(file, script(workers))
                break
            except FileExistsError:
                number += 1
        submitted = server_time(folder)
        job = slurm.submit(file, *([f"--dependency=afterany:{after}"] if after else []))
        record = Submission(
            job=job, partition=workers.partition, workers=workers.count, submitted=submitted, script=file.name
        )
        create_private(folder / f"{job}.json", msgspec.json.encode(record).decode())
    except OSError as error:
        raise cannot_write(folder, error) from error
    return record


def again(folder: Path, entry: Submission, count: int) -> Submission:
    """Hand in a script once more, for `count` workers. Raises PenstockError."""
    file = folder / "jobs" / entry.script
    try:
        submitted = server_time(file.parent)
        job = slurm.submit(file, f"--array=0-{count - 1}")
        record = msgspec.structs.replace(entry, job=job, workers=count, submitted=submitted)
        create_private(file.parent / f"{job}.json", msgspec.json.encode(record).decode())
    except OSError as error:
        raise cannot_write(file.parent, error) from error
    return record


def submissions(folder: Path) -> list[Submission]:
    """What was submitted for a farm, the first one first."""
    found = []
    for file in (folder / "jobs").glob("*.json"):
        try:
            found.append(msgspec.json.decode(file.read_bytes(), type=Submission))
        except (OSError, msgspec.DecodeError):
            continue
    return sorted(found, key=lambda entry: (entry.submitted, int(entry.job)))


class Queue(msgspec.Struct, frozen=True):
    """What Slurm has of a farm: elements of its arrays, by partition. examples: one that waits, by partition."""

    running: dict[str, int]
    waiting: dict[str, int]
    examples: dict[str, slurm.Job]

    def explained(self, hopeless: bool = False) -> list[str]:
        """Why what waits does so, a line a partition; hopeless: only of those that will never start as they are."""
        return [
            f"{partition}: {self.waiting[partition]} wait, {words.pending(job.reason, job.id)}"
            for partition, job in self.examples.items()
            if words.hopeless(job.reason) or not hopeless
        ]


def queue(known: Sequence[Submission]) -> Queue | None:
    """One call of squeue; None when there is nothing to ask, or nobody answers."""
    if not known or not slurm.available("squeue"):
        return None
    try:
        jobs = slurm.jobs().values()
    except PenstockError:
        return None
    partitions = {entry.job: entry.partition for entry in known}
    running: dict[str, int] = {}
    waiting: dict[str, int] = {}
    examples: dict[str, slurm.Job] = {}
    for job in jobs:
        partition = partitions.get(job.id.partition("_")[0])
        if partition is None:
            continue
        if job.state in slurm.RUNNING:
            running[partition] = running.get(partition, 0) + 1
        elif job.state in slurm.WAITING:
            waiting[partition] = waiting.get(partition, 0) + elements(job.id)
            examples[partition] = job
    return Queue(running, waiting, examples)


def running_jobs() -> Collection[str] | None:
    """The names of this user's running jobs; None when Slurm does not answer."""
    if not slurm.available("squeue"):
        return None
    try:
        return {job.id for job in slurm.jobs().values() if job.state in slurm.RUNNING}
    except PenstockError:
        return None


def elements(job: str) -> int:
    """How many jobs squeue shows as one: 17_[0-3,7%2] are five."""
    match = re.search(r"\[([^\]%]*)", job)
    if match is None:
        return 1
    count = 0
    for part in match[1].split(","):
        first, _, last = part.partition("-")
        count += int(last.partition(":")[0]) - int(first) + 1 if last else 1
    return count


def shares(asked: str, workers: int) -> dict[str, int]:
    """Workers by partition. asked: `all`, or names with commas, each perhaps with its number (`cpu:2,gpu`).

    Those without a number share what is left of `workers` by their nodes. Raises UsageError, EnvironmentFault.
    """
    nodes = partitions()
    wanted: dict[str, int | None] = dict.fromkeys(nodes)
    if asked != "all":
        wanted = {}
        for part in asked.split(","):
            name, colon, number = part.strip().partition(":")
            if name not in nodes or (colon and not (number.isdecimal() and int(number))):
                raise UsageError(
                    f"--partitions {asked!r}: there is no partition {name!r}."
                    if name not in nodes
                    else f"--partitions {asked!r}: {number!r} is not a number of workers.",
                    f"Partitions here: {', '.join(nodes)}.",
                    "For example: --partitions cpu,gpu or --partitions cpu:2,gpu:6 or --partitions all",
                )
            wanted[name] = int(number) if colon else None
    left = workers - sum(number or 0 for number in wanted.values())
    free = [name for name, number in wanted.items() if number is None]
    if left < 0 or (left and not free):
        raise UsageError(f"--workers {workers} and the numbers in --partitions {asked!r} contradict each other.")
    result = {name: number for name, number in wanted.items() if number is not None}
    total = sum(nodes[name] for name in free)
    for name in sorted(free, key=lambda name: nodes[name]):  # the smallest first, so that each gets one if it can be
        share = min(left, max(1, round(left * nodes[name] / total)))
        if share:
            result[name] = share
        left, total = left - share, total - nodes[name]
    return result


def check_can_submit() -> None:
    """Raise EnvironmentFault where there is no Slurm."""
    if not slurm.available("sbatch"):
        raise EnvironmentFault(
            "There is no `sbatch` on this machine.",
            "Workers on other nodes are jobs of Slurm, which login nodes can submit.",
            "Log in to the cluster; or run the farm on this machine: penstock farm run",
        )


def check_partitions(names: Collection[str]) -> None:
    """Raise UsageError when a profile is for a partition that is not there: nothing would ever take it."""
    known = partitions()
    missing = sorted({*names} - {*known})
    if missing:
        raise UsageError(
            f"--profile {missing[0]}:...: there is no partition {missing[0]!r}.",
            f"Partitions here: {', '.join(known)}.",
        )


def partitions() -> dict[str, int]:
    """The partitions that are up, with their nodes. Raises EnvironmentFault."""
    lines = [line.split("|") for line in slurm.run("sinfo", "--noheader", "--format=%R|%a|%D").splitlines()]
    found: dict[str, int] = {}
    for name, state, count in lines:
        if state == "up":
            found[name] = found.get(name, 0) + int(count)
    return found


def _comment(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
