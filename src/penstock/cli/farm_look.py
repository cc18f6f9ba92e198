"""`penstock farm status`, `cancel`, `merge`, `report`: everything that looks at a farm, or ends it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from penstock.cli.options import FiniteFloat, check_apart
from penstock.cli.progress import duration
from penstock.errors import EnvironmentFault, PartialResults

if TYPE_CHECKING:
    from penstock.batch.farm.answers import Audit
    from penstock.batch.farm.audit import OutputAudit
    from penstock.batch.farm.spool import Spool
    from penstock.batch.farm.status import GroupStatus, Status

farm_argument = click.argument("folder", metavar="FARM", type=click.Path(path_type=Path, file_okay=False))


@click.command(short_help="How a farm goes.")
@farm_argument
@click.option("-w", "--watch", is_flag=True, help="Show it anew every few seconds, until it is complete.")
@click.option("--every", type=FiniteFloat(0.2, 3600), default=5.0, show_default=True, help="Seconds, with --watch.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout (with --watch, one a line).")
def status(folder: Path, watch: bool, every: float, as_json: bool) -> None:
    """Rows done, rate, time left, by node and partition, and what went wrong.

    It only counts what is in the folder and asks Slurm once, so it can be run anywhere and at any time.
    """
    import msgspec

    from penstock.batch.farm.ledger import Ledger
    from penstock.batch.farm.spool import Spool
    from penstock.batch.farm.status import status_of
    from penstock.cluster.workers import queue, submissions

    spool = Spool(folder.resolve())
    ledger = Ledger(spool)
    while True:
        jobs = queue(submissions(spool.folder))
        found = status_of(ledger, jobs.waiting if jobs else None, sum(jobs.running.values()) if jobs else 0)
        if as_json:
            click.echo(msgspec.json.encode(found))
            sys.stdout.flush()
        else:
            if watch and sys.stdout.isatty():
                click.clear()
            show(found)
            for line in jobs.explained() if jobs else ():
                click.echo(line)
        if not watch or found.complete:
            return
        time.sleep(every)


@click.command(short_help="End a farm's workers; what is done stays.")
@farm_argument
def cancel(folder: Path) -> None:
    """Tell all workers of a farm to hand back what they hold and to leave. `penstock farm resume` goes on later."""
    from penstock.batch.farm.spool import Spool
    from penstock.cluster import slurm
    from penstock.cluster.workers import submissions

    spool = Spool(folder.resolve())
    try:
        spool.stop.touch(mode=0o600)
    except OSError as error:
        raise EnvironmentFault(f"{spool.stop} cannot be made: {error.strerror}.") from None
    jobs = [entry.job for entry in submissions(spool.folder)]
    if jobs and slurm.available("scancel"):
        slurm.cancel(jobs)
    print(f"cancelled; `penstock farm resume {spool.folder}` goes on", file=sys.stderr)


@click.command(short_help="All answers into one file, in the order of the prompts; --check audits.")
@farm_argument
@click.option("-o", "--output", metavar="FILE", help="JSONL.  [default: FARM/output.jsonl]")
@click.option("--partial", is_flag=True, help="Merge what is there, even if rows are open.")
@click.option("--check", is_flag=True, help="Write nothing: check the farm, and FILE if it is there, row by row.")
@click.option("--json", "as_json", is_flag=True, help="The audit as JSON on stdout.")
def merge(folder: Path, output: str | None, partial: bool, check: bool, as_json: bool) -> int:
    """Write each row's answer once, in the order of the prompts, with the fields that `penstock generate` writes.

    Exit code 6: rows are open, or ended in an error. 1: something is in the folder that must not be.
    """
    import msgspec

    from penstock.batch.farm.audit import audit
    from penstock.batch.farm.merge import merge as merge_all
    from penstock.batch.farm.spool import Spool

    spool = Spool(folder.resolve())
    file = spool.folder / "output.jsonl" if output is None else Path(output).expanduser()
    if not check:
        if not file.parent.is_dir():
            raise EnvironmentFault(f"The folder {file.parent} does not exist.")
        manifest = spool.manifest
        for name in ("farm.json", manifest.rows, manifest.shards, *([manifest.source.path] if manifest.source else ())):
            check_apart(spool.folder / name, file)
    found, checked = audit(spool, file) if check else (merge_all(spool, file, partial), None)
    sound = found.sound and (checked is None or checked.sound)
    if as_json:
        record = {**msgspec.to_builtins(found), "sound": sound, "complete": found.complete}
        click.echo(msgspec.json.encode({**record, "output": None if checked is None else msgspec.to_builtins(checked)}))
    _say_audit(found, checked, None if check else file)
    if not check and spool.manifest.stats:
        write_report(spool)
    if not sound:
        return 1
    if not found.complete:
        raise PartialResults(
            f"{found.open:,} of {found.rows:,} rows are not answered yet.",
            "",
            f"`penstock farm resume {spool.folder}` goes on.",
        )
    if found.failed:
        raise PartialResults(
            f"{found.failed:,} of {found.rows:,} rows ended in an error.", "Their `error` field says why."
        )
    return 0


@click.command(short_help="Where the time went: figures, and plots as one HTML file.")
@farm_argument
@click.option("-o", "--output", metavar="FILE", help="HTML.  [default: FARM/report.html]")
@click.option("--png", metavar="FILE", help="The plots as a picture, too (needs the extra `plot`).")
@click.option("--json", "as_json", is_flag=True, help="The figures as JSON on stdout.")
def report(folder: Path, output: str | None, png: str | None, as_json: bool) -> None:
    """Tokens a second by node and partition, cost, time lost to queues, staging, loading and preemption; plots."""
    import msgspec

    from penstock.batch.farm.spool import Spool

    spool = Spool(folder.resolve())
    found = write_report(
        spool,
        None if output is None else Path(output).expanduser(),
        None if png is None else Path(png).expanduser(),
        quiet=as_json,
    )
    if as_json:
        click.echo(msgspec.json.encode(found))


def write_report(spool: Spool, html: Path | None = None, png: Path | None = None, quiet: bool = False) -> object:
    """report.html and stats.json, and the figures on stderr; returns the figures."""
    import msgspec

    from penstock.batch.farm.ledger import Ledger
    from penstock.batch.farm.report import page
    from penstock.batch.farm.stats import stats_of, table
    from penstock.batch.lines import write_whole
    from penstock.cluster.workers import submissions

    html = html or spool.folder / "report.html"
    ledger = Ledger(spool)
    ledger.update()
    found = stats_of(ledger, {entry.job: entry.submitted for entry in submissions(spool.folder)})
    try:
        write_whole(html, page(spool, ledger, found).encode())
        write_whole(spool.folder / "stats.json", msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    except OSError as error:
        raise EnvironmentFault(f"{html} cannot be written: {error.strerror}.") from None
    if png is not None:
        from penstock.batch.farm.picture import draw

        draw(ledger, found, png)
    if not quiet:
        for line in table(found):
            print(line, file=sys.stderr)
        print(f"{html}", file=sys.stderr)
    return found


def say(found: Status) -> None:
    """One line on stderr."""
    print(headline(found), file=sys.stderr, flush=True)


def headline(found: Status) -> str:
    """How far it is, in a line."""
    left = "" if found.complete or found.seconds_left is None else f", {duration(found.seconds_left)} left"
    bad = f", {found.failed:,} with errors" if found.failed else ""
    state = (
        "complete" if found.complete else "cancelled" if found.cancelled else f"{found.tokens_per_second:,.0f} tokens/s"
    )
    return f"{found.done:,} of {found.rows:,} rows done{bad}; {state}{left}"


def show(found: Status) -> None:
    """The status for people, on stdout."""
    click.echo(f"{found.folder}  ({found.model})")
    click.echo(headline(found))
    alive = sum(group.workers for group in found.nodes)
    if found.jobs_running or found.jobs_waiting or alive:
        click.echo(f"{alive} workers; Slurm: {found.jobs_running} jobs run, {found.jobs_waiting} wait")
    elif not found.complete:
        click.echo(f"nobody works on it: penstock farm resume {found.folder}")
    for title, groups in (("PARTITION", found.partitions), ("NODE", found.nodes)):
        _groups(title, groups)
    for sentence in found.failures:
        click.echo(f"! {_printable(sentence)}")


def _groups(title: str, groups: list[GroupStatus]) -> None:
    width = max([len(title), *(len(group.name) for group in groups)])
    if groups:
        click.echo(f"{title:<{width}}  {'WORKERS':>7} {'ROWS':>9} {'TOKENS':>12} {'TOKENS/S':>9} {'WAITING':>7}")
    for group in groups:
        click.echo(
            f"{group.name:<{width}}  {group.workers:>7} {group.rows:>9,} {group.tokens:>12,} "
            f"{group.tokens_per_second:>9,.0f} {group.jobs_waiting:>7}"
        )


def _say_audit(found: Audit, out: OutputAudit | None, written: Path | None) -> None:
    if written is not None:
        print(f"{found.answered:,} of {found.rows:,} rows in {written}", file=sys.stderr)
    say_line = (
        f"{found.answered:,} answered, {found.open:,} open, {found.lost:,} lost, {found.foreign:,} foreign, "
        f"{found.repeated:,} computed again, {found.failed:,} with errors ({found.aside:,} set aside); "
        f"{found.lives:,} lives, {found.damaged:,} damaged lines"
    )
    print(say_line, file=sys.stderr)
    if found.changed_shards:
        print(f"! prompts of {len(found.changed_shards)} shards have changed", file=sys.stderr)
    if out is not None:
        print(
            f"{out.file}: {out.rows:,} rows, {out.missing:,} missing, {out.doubled:,} doubled, "
            f"{out.foreign:,} foreign, "
            f"{out.torn:,} torn, {out.disordered:,} out of order, {out.different:,} different",
            file=sys.stderr,
        )


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
