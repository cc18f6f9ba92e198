"""`penstock logs`: what a server in a job has printed."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from penstock.cli.options import Whole
from penstock.errors import EnvironmentFault

if TYPE_CHECKING:
    from penstock.cluster.registry import Launch

GLANCE = 0.5  # seconds between two looks at the file
ASK = 10.0  # seconds between two questions to Slurm


@click.command(short_help="Show what a server in a Slurm job prints.")
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on while it prints, over requeues and renewals.")
@click.option("-n", "--lines", type=Whole(0), default=None, help="Only the last N lines.")
@click.option("--job", metavar="ID", help="Of that job.  [default: the one that began last]")
def logs(name: str, follow: bool, lines: int | None, job: str | None) -> None:
    """Show the log of the server NAME."""
    from penstock.cluster import fleet

    launch = fleet.launch_of(name)
    begun = _begun(launch)
    if job is None:
        job = begun[-1] if begun else None
    elif job not in begun:
        raise EnvironmentFault(f"Job {job} of {name!r} has no log.", f"Jobs with one: {', '.join(begun) or 'none'}.")
    if job is None and not follow:
        raise EnvironmentFault(
            f"The server {name!r} has no log yet.", "Its job has not begun.", f"penstock logs {name} -f waits for it."
        )
    position = 0
    if job is not None:
        position = _show(launch, job, _start(launch, job, lines))
    if follow:
        _follow(launch, job, position)


def _follow(launch: Launch, job: str | None, position: int) -> None:
    """Print what is added, until no job of the launch lives."""
    from penstock.cluster import fleet

    asked = time.monotonic()
    while True:
        time.sleep(GLANCE)
        if job is not None:
            position = _show(launch, job, position)
        later = [other for other in _begun(launch) if job is None or int(other) > int(job)]
        if later:
            job, position = later[0], 0
            click.echo(f"--- job {job} ---", err=True)
            continue
        if time.monotonic() - asked > ASK:
            asked = time.monotonic()
            if not any(server.alive for server in fleet.servers(launch, fleet.ask_slurm())):
                return


def _begun(launch: Launch) -> list[str]:
    return [job for job in launch.jobs() if launch.log(job).exists()]


def _start(launch: Launch, job: str, lines: int | None) -> int:
    """The offset of the last so many lines."""
    if lines is None:
        return 0
    raw = launch.log(job).read_bytes()
    kept = raw.splitlines(keepends=True)[len(raw.splitlines()) - lines if lines < len(raw.splitlines()) else 0 :]
    return len(raw) - sum(map(len, kept))


def _show(launch: Launch, job: str, position: int) -> int:
    """Print a log from an offset on; returns the new one. Control characters cannot drive the terminal."""
    try:
        with launch.log(job).open("rb") as stream:
            stream.seek(position)
            raw = stream.read()
    except OSError:
        return position
    if raw:
        text = raw.decode("utf-8", "replace")
        safe = text if not sys.stdout.isatty() else "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
        sys.stdout.write(safe)
        sys.stdout.flush()
    return position + len(raw)
