"""`penstock stage`: a model on the RAM disk or local disk of every node of a job."""

from __future__ import annotations

import json
import os
import subprocess
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.options import FiniteFloat, find_model, source_options
from penstock.errors import UsageError

if TYPE_CHECKING:
    from penstock.cluster.staging.strategies import Timing

STRATEGIES = ("auto", "direct", "sbcast", "tree", "chain", "broadcast")


@click.command(
    short_help="Bring a model to the RAM disk or local disk of a job's nodes.",
    context_settings={"allow_interspersed_args": True},
)
@click.argument("model", required=False)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--to",
    type=click.Choice(["auto", "ram", "scratch"]),
    default="auto",
    show_default=True,
    help="RAM disk where it fits.",
)
@click.option(
    "--strategy", type=click.Choice(STRATEGIES), default="auto", show_default=True, help="How; auto measures a sample."
)
@click.option("--measure", is_flag=True, help="Print a table: each strategy for 1, 2, 4 ... nodes.")
@click.option(
    "--gigabytes", type=FiniteFloat(0, above_low=True), default=1.0, show_default=True, help="With --measure."
)
@click.option("--clean", is_flag=True, help="Remove MODEL, or all that is staged, unless another job uses it.")
@click.option("--site", metavar="NAME", help="A site profile: a shipped one or a file.  [default: found]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@source_options
def stage(model: str | None, command: tuple[str, ...], as_json: bool, **options: Any) -> int | None:
    """Bring MODEL to every node of this job, check it there, and print its path, the same on all nodes.

    Later jobs of yours on these nodes find it. With a COMMAND after `--`, it runs that with {} replaced by the path, and
    removes the copy afterwards: penstock stage MODEL -- srun penstock generate {} ...
    """
    from penstock.cluster.staging import stage as staging
    from penstock.plan.site import load_site

    site, job = load_site(options["site"]), staging.allocation()
    if model is None and not options["clean"]:
        raise UsageError("There is no model to stage.", "", "For example: penstock stage ORG/NAME")
    folder = None if model is None else find_model(model, options["revision"], options["offline"]).path
    if options["clean"]:
        removed, kept = staging.clean(folder, site, job)
        click.echo(f"removed {removed}, kept {kept} that other jobs use", err=True)
        if as_json:
            click.echo(json.dumps({"removed": removed, "kept": kept}))
        return None
    assert folder is not None  # noqa: S101 (for mypy)
    if options["measure"]:
        table = staging.measure(folder, site, options["to"], job, _say, int(options["gigabytes"] * 1e9))
        _show_table(table, as_json)
        return None
    strategy = None if options["strategy"] == "auto" else options["strategy"]
    done = staging.stage(folder, site, options["to"], strategy, job, _say)
    if done.timing is None:
        _say(f"it is already on {staging.parts(done.nodes)}")
    else:
        _say(
            f"staged by {done.timing.strategy.name} in {done.timing.seconds:.2f} s ({done.timing.gb_s:.2f} GB/s a node), "
            f"checked in {done.check_seconds:.2f} s, on {staging.parts(done.nodes)}"
        )
    if as_json:
        record: dict[str, Any] = {"path": str(done.path), "nodes": done.nodes, "reused": done.timing is None}
        if done.timing is not None:
            record |= {"strategy": done.timing.strategy.name, "seconds": round(done.timing.seconds, 3)}
            record |= {"bytes": done.timing.size, "check_seconds": round(done.check_seconds, 3)}
        click.echo(json.dumps(record))
    elif not command:
        click.echo(done.path)
    return _run(command, str(done.path), folder, site, job) if command else None


def _run(command: tuple[str, ...], path: str, folder: Any, site: Any, job: Any) -> int:
    """Run a command with the staged model, then remove the copy."""
    from penstock.cluster.staging import stage as staging

    line = [path if part == "{}" else part for part in command]
    try:
        return subprocess.run(line, check=False, env={**os.environ, "PENSTOCK_STAGED": path}).returncode
    finally:
        staging.clean(folder, site, job)


def _show_table(table: list[tuple[int, list[Timing]]], as_json: bool) -> None:
    """Seconds and GB/s a node, one line a strategy and number of nodes."""
    rows = [
        {
            "nodes": count,
            "strategy": timing.strategy.name,
            "seconds": round(timing.seconds, 3),
            "gb_s_a_node": round(timing.gb_s, 3),
            "problem": timing.problem,
        }
        for count, timings in table
        for timing in timings
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    click.echo(f"{'NODES':>5}  {'STRATEGY':<10} {'SECONDS':>8} {'GB/S A NODE':>12}")
    for row in rows:
        figures = row["problem"] or f"{row['seconds']:>8.2f} {row['gb_s_a_node']:>12.2f}"
        click.echo(f"{row['nodes']:>5}  {row['strategy']:<10} {figures}")


def _say(line: str) -> None:
    click.echo(f"stage: {line}", err=True)
