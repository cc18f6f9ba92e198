"""`penstock farm run`, `submit`, `resume`: everything that starts workers."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.batch_options import generation_options, parameters_of, shape_of, shape_options
from penstock.cli.main import INTERRUPTED
from penstock.cli.options import COUNT, FiniteFloat, engine_options, find_model, input_path, source_options, stack
from penstock.errors import PartialResults, UsageError

if TYPE_CHECKING:
    from penstock.batch.farm.prepare import Order
    from penstock.batch.farm.spool import Spool
    from penstock.cluster.workers import Submission

_SECONDS = FiniteFloat(0, 1e6, above_low=True)

farm_argument = click.argument("folder", metavar="FARM", type=click.Path(path_type=Path, file_okay=False))

order_options = stack(
    click.option(
        "-i", "--prompts-file", "--input", "source", required=True, metavar="FILE", help="Prompts; - is stdin."
    ),
    click.option("-m", "--model", required=True, metavar="MODEL", help="demo, a folder, or ORG/NAME of the hub."),
    click.option(
        "-o", "--output", required=True, metavar="FARM", help="Folder of the farm, which all nodes can reach."
    ),
    shape_options,
    generation_options,
    click.option(
        "--profile",
        "profiles",
        multiple=True,
        metavar="PARTITION:NAME=VALUE,...",
        help="What a partition does differently: model, dtype, quantize, max-batch-size, cpus, gpus, time ...",
    ),
    click.option(
        "--shard-rows", type=COUNT, default=64, show_default=True, help="Rows that a worker claims at a time."
    ),
    click.option("--lease", type=_SECONDS, default=60.0, show_default=True, help="Seconds without a sign of life."),
    click.option("--commit", type=_SECONDS, default=5.0, show_default=True, help="Seconds between writes to disk."),
    click.option(
        "--idle", type=_SECONDS, default=300.0, show_default=True, help="Seconds without work, and it leaves."
    ),
    click.option("--grace", type=FiniteFloat(0, 3600), default=2.0, show_default=True, help="Seconds to finish rows."),
    click.option("--stats", is_flag=True, help="At the end write stats.json and report.html, and print the figures."),
)


@click.command(short_help="Run a farm on this machine.")
@order_options
@click.option("--workers", type=COUNT, help="Processes.  [default: one a GPU, else one a memory node]")
@click.option("--json", "as_json", is_flag=True, help="The final status as JSON on stdout.")
@source_options
@engine_options
def run(source: str, output: str, workers: int | None, as_json: bool, **options: Any) -> int:
    """Answer a file of prompts with workers on this machine, merge the answers into FARM/output.jsonl.

    Interrupted or killed, the same command goes on where it was, and so does `penstock farm resume FARM`.
    """
    from penstock.batch.farm.prepare import prepare

    order = _order(options)
    spool = prepare(order, _folder(output), input_path(source), options["input_format"], shape_of(options))
    return run_here(_check_wanted(spool), workers, as_json)


@click.command(short_help="Start a farm's workers as Slurm jobs.")
@order_options
@click.option("--partitions", default="all", show_default=True, metavar="NAMES", help="cpu,gpu or cpu:2,gpu:6 or all.")
@click.option("--workers", type=COUNT, required=True, help="Jobs of one node each, over all partitions.")
@click.option("-A", "--account", metavar="NAME", help="Who pays.")
@click.option("-t", "--time", metavar="TIME", help="Slurm's notation: 90, 3:00:00, 2-00.")
@click.option("-G", "--gpus", metavar="[TYPE:]N", help="Cards of each worker, where --profile says nothing.")
@click.option("-c", "--cpus-per-task", "--cpus", "cpus", type=COUNT, help="Cores of each worker.")
@click.option("--mem", metavar="SIZE", help="Memory of each worker: 16G.")
@click.option("--qos", metavar="NAME", help="Quality of service.")
@click.option("--constraint", metavar="LIST", help="Features that the nodes must have.")
@click.option("--sbatch", multiple=True, metavar="FLAG", help="Any other flag of sbatch, as --sbatch=--FLAG=VALUE.")
@click.option("--stage/--no-stage", default=None, help="Copy the model to each node first.  [default: from 1 GB on]")
@click.option("--chain", type=COUNT, default=1, show_default=True, help="So many times, each when the last is over.")
@click.option("--site", metavar="NAME", help="A site profile: a shipped one or a file.  [default: found]")
@click.option("--dry-run", is_flag=True, help="Print the scripts, submit nothing.")
@click.option("--json", "as_json", is_flag=True, help="The jobs as JSON on stdout.")
@source_options
@engine_options
def submit(source: str, output: str, partitions: str, workers: int, as_json: bool, **options: Any) -> None:
    """Submit workers that answer a file of prompts together, and return at once.

    Each worker is a job of one node, so that the farm begins with the first node that is free. On a farm that is there
    already it adds workers. See how it goes with `penstock farm status FARM`.
    """
    from penstock.batch.farm.prepare import draft, prepare
    from penstock.batch.farm.submission import shapes, submit_all
    from penstock.cluster.script import Resources, sbatch_flags, seconds_of
    from penstock.cluster.workers import check_can_submit, check_partitions, script, shares

    check_can_submit()
    if options["time"] is not None:
        seconds_of(options["time"])
    counts = shares(partitions, workers)
    common = Resources(
        **{name: options[name] for name in ("account", "time", "gpus", "cpus", "mem", "qos", "constraint")},
        more=sbatch_flags(options["sbatch"]),
    )
    order, what = _order(options), (_folder(output), input_path(source), options["input_format"], shape_of(options))
    check_partitions(set(order.profiles) - {""})
    if options["dry_run"]:
        for shape in shapes(draft(order, *what), counts, common, options["stage"], options["site"]):
            click.echo(script(shape))
        return
    spool = _check_wanted(prepare(order, *what))
    found = shapes(spool, counts, common, options["stage"], options["site"])
    if spool.complete():
        print(f"every row is answered: penstock farm merge {spool.folder}", file=sys.stderr)
        return
    _say_jobs(submit_all(found, options["chain"]), as_json)
    print(f"see `penstock farm status {spool.folder} --watch`", file=sys.stderr)


@click.command(short_help="Go on with a farm whose workers have gone.")
@farm_argument
@click.option("--workers", type=COUNT, help="As so many; on Slurm, of each kind that is missing.")
@click.option("--json", "as_json", is_flag=True, help="What was started, or the final status, as JSON on stdout.")
def resume(folder: Path, workers: int | None, as_json: bool) -> int | None:
    """Go on with a farm: submit again the workers that are neither running nor waiting, or run here what ran here.

    Nothing is done twice, whoever still works. It refuses when the prompts, the model or the parameters have changed.
    """
    from penstock.batch.farm.prepare import reopen
    from penstock.batch.farm.submission import resubmit
    from penstock.cluster.workers import submissions

    spool = reopen(folder.resolve())
    if not submissions(spool.folder):
        return run_here(spool, workers, as_json)
    complete = spool.complete()
    started = [] if complete else resubmit(spool, workers)
    if complete:
        print(f"every row is answered: penstock farm merge {spool.folder}", file=sys.stderr)
    elif not started:
        print("all of its workers are there already", file=sys.stderr)
    _say_jobs(started, as_json)
    return None


def _order(options: dict[str, Any]) -> Order:
    """What is asked for."""
    from penstock.batch.farm.manifest import ENGINE_FIELDS, Profile, Timing, parse_profiles
    from penstock.batch.farm.prepare import Order
    from penstock.cli.options import weight_format

    common = Profile(
        **{name: options[name] for name in ENGINE_FIELDS if options.get(name) is not None}
        | {"quantize": weight_format(options["quantize"])}
    )
    lease = options["lease"]
    timing = Timing(
        lease=lease, beat=min(5.0, lease / 6), commit=options["commit"], idle=options["idle"], grace=options["grace"]
    )
    return Order(
        model=options["model"],
        find=lambda name: find_model(name, options["revision"], options["offline"], options["trust_remote_code"]),
        parameters=parameters_of(options),
        profiles={"": common, **parse_profiles(options["profiles"])},
        shard_rows=options["shard_rows"],
        timing=timing,
        stats=options["stats"],
    )


def _folder(output: str) -> Path:
    return Path(output).expanduser().resolve()


def _check_wanted(spool: Spool) -> Spool:
    """Raise UsageError for a farm that was cancelled."""
    if spool.cancelled():
        raise UsageError(
            f"The farm in {spool.folder} was cancelled.", "", f"`penstock farm resume {spool.folder}` goes on with it."
        )
    return spool


def run_here(spool: Spool, workers: int | None, as_json: bool) -> int:
    """Workers of this machine, to the end: (merge, figures), the exit code."""
    from penstock.batch.farm.ledger import Ledger
    from penstock.batch.farm.local import places_here, run_locally
    from penstock.batch.farm.merge import merge
    from penstock.batch.farm.status import status_of
    from penstock.cli.farm_look import say, write_report
    from penstock.cli.progress import RowProgress

    ledger = Ledger(spool)
    ledger.update()
    places = places_here(workers)
    progress = RowProgress(spool.total, ledger.rows)
    with progress:

        def look() -> None:
            rows, tokens = ledger.rows, ledger.tokens
            ledger.glance()
            progress.advance(ledger.rows - rows, ledger.tokens - tokens)

        code = run_locally(spool, places, look)
    found = status_of(ledger)
    if found.complete:
        merge(spool, spool.folder / "output.jsonl")
        if spool.manifest.stats:
            write_report(spool)
    say(found)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(found))
    if not found.complete:
        if code in (INTERRUPTED, 6):
            print(f"interrupted; `penstock farm resume {spool.folder}` goes on", file=sys.stderr)
            return INTERRUPTED
        return code or 1
    return end(spool, found.failed, found.aside)


def end(spool: Spool, failed: int, aside: int) -> int:
    """0, or PartialResults for rows that ended in an error."""
    if failed:
        raise PartialResults(
            f"{failed:,} of {spool.total:,} rows ended in an error"
            + (f", {aside:,} of them because workers died on them." if aside else "."),
            "Their `error` field says why.",
        )
    return 0


def _say_jobs(started: Iterable[Submission], as_json: bool) -> None:
    """Tell of jobs as they are submitted, and warn of those that will never start."""
    from penstock.cluster.workers import queue

    told = []
    for entry in started:
        print(f"job {entry.job}: workers in {entry.partition}: {entry.workers}", file=sys.stderr)
        told.append(entry)
    found = queue(told)
    for line in found.explained(hopeless=True) if found else ():
        print(f"WARNING: {line}", file=sys.stderr)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(told))
