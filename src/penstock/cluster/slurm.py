"""Slurm's commands as functions. Text formats only: every site's version has them, `--json` is younger.

Nothing here polls: one call of a function is one call of a command.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.cluster.refusals import refused
from penstock.errors import EnvironmentFault, PenstockError

PATIENCE = 60.0  # seconds that a busy controller may take
RUNNING = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT")
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_COLUMNS = "%i|%T|%N|%L|%S|%P|%r|%j"  # the last two may hold anything
_DURATION = re.compile(r"(?:(?P<d>\d+)-)?(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)")


@dataclass(frozen=True)
class Job:
    """One job as squeue shows it. left: seconds until its time limit, None where there is none or it has not begun."""

    id: str
    state: str
    node: str
    left: int | None
    starts: str
    partition: str
    reason: str
    name: str

    @property
    def alive(self) -> bool:
        """Whether it waits or runs."""
        return self.state in RUNNING or self.state in WAITING


@dataclass(frozen=True)
class Ending:
    """How a job ended, as the accounting says. exit_code: `CODE:SIGNAL`."""

    state: str
    exit_code: str


def available(program: str) -> bool:
    """Whether a command of Slurm is here."""
    return shutil.which(program) is not None


def run(program: str, *arguments: str, timeout: float = PATIENCE) -> str:
    """What a command of Slurm prints. Raises EnvironmentFault when it is missing or silent, else what `refused` says."""
    try:
        done = subprocess.run(  # Slurm makes a job's log under the umask of its submission
            [program, *arguments], capture_output=True, text=True, timeout=timeout, check=False, umask=0o077
        )
    except FileNotFoundError:
        raise missing(program) from None
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(
            f"Slurm does not answer: {program} was silent for {timeout:g} s.",
            hint="Try again in a minute; `sdiag` and `scontrol ping` say how the controller is.",
        ) from None
    if done.returncode != 0:
        raise refused(program, done.stderr or done.stdout, arguments)
    return done.stdout


def missing(program: str) -> EnvironmentFault:
    """The error for a machine without Slurm."""
    return EnvironmentFault(
        f"There is no `{program}` on this machine.",
        "Servers are started with Slurm's commands, which login nodes have.",
        "Log in to the cluster, or load its module (`module load slurm`). Without Slurm: penstock serve MODEL",
    )


def submit(script: Path, *flags: str) -> str:
    """Hand a batch script in; returns the job's id. Raises UsageError or EnvironmentFault with Slurm's words."""
    out = run("sbatch", "--parsable", *flags, str(script))
    job, _, _cluster = out.strip().splitlines()[-1].partition(";")
    if not job.isdigit():
        raise EnvironmentFault(f"sbatch answered {out.strip()[:200]!r} instead of a job's number.")
    return job


def jobs() -> dict[str, Job]:
    """This user's jobs by id, those that ended some minutes ago included. One call for all of them."""
    out = run("squeue", "--noheader", f"--user={os.getuid()}", "--states=all", f"--format={_COLUMNS}")
    return {job.id: job for line in out.splitlines() if (job := _job(line)) is not None}


def one(job: str) -> Job | None:
    """A single job; None when Slurm has forgotten it or is not here."""
    try:
        out = run("squeue", "--noheader", f"--jobs={job}", "--states=all", f"--format={_COLUMNS}")
    except PenstockError:
        return None
    return next((found for line in out.splitlines() if (found := _job(line)) is not None), None)


def endings(ids: Iterable[str]) -> dict[str, Ending]:
    """How jobs ended by the site's accounting; empty where there is none."""
    wanted = ",".join(ids)
    if not wanted or not available("sacct"):
        return {}
    try:
        out = run("sacct", "--noheader", "--parsable2", "-X", f"--jobs={wanted}", "--format=JobIDRaw,State,ExitCode")
    except PenstockError:
        return {}
    rows = [line.split("|") for line in out.splitlines()]
    return {row[0]: Ending(row[1].split()[0], row[2]) for row in rows if len(row) == 3 and row[1]}


def cancel(ids: Sequence[str]) -> None:
    """End jobs; those that are gone already are fine."""
    if ids:
        run("scancel", "--quiet", *ids)


def node_address(node: str) -> str | None:
    """The address that Slurm has for a node, for names that this machine cannot resolve."""
    try:
        out = run("scontrol", "--oneliner", "show", "node", node)
    except PenstockError:
        return None
    found = re.search(r"\bNodeAddr=(\S+)", out)
    return found[1] if found else None


def seconds(text: str) -> int | None:
    """A duration of Slurm ([D-][H:]M:S) in seconds; None for UNLIMITED, INVALID and the like."""
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        return None
    days, hours, minutes, rest = (int(match[part] or 0) for part in "dhms")
    return ((days * 24 + hours) * 60 + minutes) * 60 + rest


def _job(line: str) -> Job | None:
    fields = line.split("|", 7)
    if len(fields) != 8:
        return None
    number, state, node, left, starts, partition, reason, name = (field.strip() for field in fields)
    running = state in RUNNING
    reason = "" if reason == "None" else reason
    return Job(number, state, node, seconds(left) if running else None, starts, partition, reason, name)
