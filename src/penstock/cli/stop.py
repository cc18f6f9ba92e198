"""`penstock stop`: end a server's job and its successors."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import click

from penstock.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from penstock.cluster.registry import Launch

PATIENCE = 120.0  # seconds: draining, and Slurm's own grace


@click.command(short_help="End a server that runs as a Slurm job.")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option("--all", "everything", is_flag=True, help="Every server of yours.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until its jobs are gone.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the jobs that were ended.")
def stop(names: tuple[str, ...], everything: bool, wait: bool, as_json: bool) -> None:
    """End the server NAME: running requests may finish, its renewals are cancelled, its key is removed."""
    from penstock.cluster import fleet, registry, slurm

    if everything == bool(names):
        raise UsageError("Name the servers to end, or give --all.", "", "`penstock jobs` lists them.")
    launches = registry.newest() if everything else [fleet.launch_of(name) for name in names]
    if not slurm.available("scancel"):
        raise slurm.missing("scancel")
    ended = {launch.name: _end(launch) for launch in launches}
    pending = [job for jobs in ended.values() for job in jobs]
    if wait and pending:
        _wait(pending)
    for launch in launches:
        launch.forget_key()
        jobs = ended[launch.name]
        if jobs or not everything:
            said = f"ended (job {', '.join(jobs)})" if jobs else "had ended already"
            click.echo(f"{launch.name} {said}.", err=True)
    if as_json:
        click.echo(json.dumps(ended))


def _end(launch: Launch) -> list[str]:
    """Cancel what lives of a launch; a job that is submitted meanwhile finds the mark and leaves."""
    from penstock.cluster import slurm

    try:
        launch.mark_stopped()
    except OSError as error:
        click.echo(f"WARNING: {launch.path} cannot be written ({error.strerror}); a renewal may come back.", err=True)
    known = slurm.jobs()
    living = [job for job in launch.jobs() if job in known and known[job].alive]
    slurm.cancel(living)
    return living


def _wait(jobs: list[str]) -> None:
    from penstock.cluster import slurm

    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        known = slurm.jobs()
        if not any(job in known and known[job].alive for job in jobs):
            return
        time.sleep(1)
    raise EnvironmentFault(
        f"Jobs {', '.join(jobs)} still run after {PATIENCE:g} s.",
        hint="`squeue --me` shows them; their node may be stuck.",
    )
