"""`penstock jobs`: the servers in Slurm's queue and on its nodes."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import click

from penstock.cli.options import FiniteFloat

if TYPE_CHECKING:
    from penstock.cluster.fleet import Server

COLUMNS = ("NAME", "JOB", "STATE", "NODE", "MODEL", "TOKENS/S", "LEFT", "URL OR REASON")


@click.command(short_help="List the servers that run as Slurm jobs.")
@click.option("-w", "--watch", is_flag=True, help="Show it anew every few seconds.")
@click.option("--every", type=FiniteFloat(1, 3600), default=5.0, show_default=True, help="Seconds, with --watch.")
@click.option("--alive", is_flag=True, help="Leave out what has ended.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON list (with --watch, one a line).")
def jobs(watch: bool, every: float, alive: bool, as_json: bool) -> None:
    """List your servers: state, queue reason, node, URL, model, tokens a second, time left.

    A name whose server has ended shows the last job and how it ended, until it is submitted again.
    """
    from penstock.cluster import fleet

    while True:
        known = fleet.ask_slurm()
        found = [server for server in fleet.all_servers(known) if server.alive or not alive]
        if as_json:
            click.echo(json.dumps([_record(server) for server in found]))
        else:
            if known is None:
                click.echo("Slurm cannot be asked here: this is what the servers say themselves.", err=True)
            if watch and sys.stdout.isatty():
                click.clear()
            _table(found)
        if not watch:
            return
        time.sleep(every)


def _record(server: Server) -> dict[str, object]:
    """A server for programs. `left` is in seconds."""
    import msgspec

    fields: dict[str, object] = msgspec.to_builtins(server)
    return {name: fields[name] for name in fields if name not in ("host", "port")}


def _table(found: list[Server]) -> None:
    """A plain table: it can be piped, and no column is cut."""
    if not found:
        click.echo("No servers. Start one: penstock submit MODEL", err=True)
        return
    rows = [COLUMNS, *(_row(server) for server in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


def _row(server: Server) -> tuple[str, ...]:
    where = server.url or server.socket or ""
    last = "  ".join(part for part in (where if server.alive else "", server.why) if part)
    rate = f"{server.tokens_per_second:,.1f}" if server.state == "ready" else "-"
    return (server.name, server.job, server.state, server.node or "-", server.model, rate, left(server.left), last)


def left(seconds: int | None) -> str:
    """Time until the limit: `2-03:04:05`, `59:00`."""
    if seconds is None:
        return "-"
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    clock = f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}"
    return f"{days}-{clock}" if days else clock
