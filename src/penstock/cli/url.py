"""`penstock url`: where a server listens."""

from __future__ import annotations

import json
import sys

import click

from penstock.cli.options import FiniteFloat


@click.command(short_help="Print the URL of a server that runs as a Slurm job.")
@click.argument("name")
@click.option("--wait", is_flag=True, help="Until it takes requests.")
@click.option("--wait-seconds", type=FiniteFloat(0), metavar="S", help="With --wait, at most so long.")
@click.option("--dependency", is_flag=True, help="Print a Slurm dependency that is met when the server is ready.")
@click.option("--sbatch", multiple=True, metavar="FLAG", help="With --dependency, flags of the small job behind it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: url, socket, key file, node, job.")
def url(
    name: str, wait: bool, wait_seconds: float | None, dependency: bool, sbatch: tuple[str, ...], as_json: bool
) -> None:
    """Print the URL of the server NAME (the path of its socket, if it listens on one).

    Run a job of yours once the server is ready: sbatch --dependency=$(penstock url NAME --dependency) JOB.sh
    """
    from penstock.cluster import fleet

    launch = fleet.launch_of(name)
    if dependency:
        from penstock.cluster.script import sbatch_flags
        from penstock.cluster.submission import gate

        click.echo(f"afterok:{gate(launch, sys.executable, sbatch_flags(sbatch))}")
        return
    if wait:
        fleet.wait(launch, lambda line: click.echo(line, err=True), wait_seconds)
    target = fleet.find(name, fleet.ask_slurm())
    server = target.server
    if as_json:
        fields = {"name": name, "job": server.job, "node": server.node, "url": server.url, "socket": server.socket}
        fields |= {"host": server.host, "port": server.port, "key_file": server.key_file}
        click.echo(json.dumps({**fields, "model": server.model, "reachable_from_here": target.reached}))
        return
    click.echo(server.url or server.socket)
    if server.key_file is not None:
        click.echo(f"Key file: {server.key_file}", err=True)
    if not target.reached:
        click.echo(f"It does not answer this machine directly; use: penstock tunnel {name}", err=True)
