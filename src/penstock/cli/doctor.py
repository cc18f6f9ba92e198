"""`penstock doctor`: what this machine has, what is wrong with it, and the cure."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from penstock.cli.checks import Check, run_checks
from penstock.cli.options import COUNT

COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}
ENVIRONMENT = 3


@click.command(short_help="Check this machine: what works, what does not, and the cure.")
@click.option("--quick", is_flag=True, help="Leave out the trial generation with the demo model.")
@click.option("--threads", type=COUNT, help="Processor threads of the trial.")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON object.")
def doctor(quick: bool, threads: int | None, as_json: bool) -> None:
    """Check everything that Penstock needs, one line each: ok, warn or fail, with the cure.

    Exit code 3 when something fails. Send this report along when you ask for help: it holds no secrets.
    """
    checks: list[Check] = []
    for check in run_checks(quick, threads):
        checks.append(check)
        if not as_json:
            _show(check)
    failed = [check.name for check in checks if check.status == "fail"]
    if as_json:
        click.echo(json.dumps(_report(checks, not failed)))
    elif failed:
        click.secho(f"failed: {', '.join(failed)}", fg="red")
    else:
        click.echo("nothing stands in the way")
    if failed:
        raise click.exceptions.Exit(ENVIRONMENT)


def _show(check: Check) -> None:
    click.secho(f"{check.status:<5}", fg=COLOURS[check.status], nl=False)
    click.echo(f"{check.name:<12} {check.text}")
    if check.cure:
        click.echo(f"{'':<18}cure: {check.cure}")


def _report(checks: list[Check], ok: bool) -> dict[str, Any]:
    return {"ok": ok, "checks": [asdict(check) for check in checks]}
