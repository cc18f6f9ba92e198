"""`penstock farm run`, `submit`, `resume`: everything that starts workers."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.batch_options import generation_options, parameters_of, shape_of, shape_options
from penstock.cli.main import INTERRUPTED
from penstock.cli.options import COUNT, FiniteFloat, engine_options, find_model, input_path, source_options, stack
from penstock.errors import EnvironmentFault, PartialResults, UsageError

if TYPE_CHECKING:
    from penstock.batch.farm.spool import Spool
    from penstock.cluster.workers import Workers

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
    spool = _prepare(source, output, options)
    return run_here(spool, workers, as_json)


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
    from penstock.cluster import slurm
    from penstock.cluster.script import sbatch_flags, seconds_of
    from penstock.cluster.workers import shares

    if not slurm.available("sbatch"):
        raise slurm.missing("sbatch")
    counts = shares(partitions, workers)
    if options["time"] is not None:
        seconds_of(options["time"])
    flags = sbatch_flags(options["sbatch"])
    spool = _prepare(source, output, options)
    shapes = [_shape(spool, name, count, options, flags) for name, count in counts.items()]
    if options["dry_run"]:
        from penstock.cluster.workers import script

        for shape in shapes:
            click.echo(script(shape))
        return
    _submit(spool, shapes, options["chain"], as_json)


@click.command(short_help="Go on with a farm whose workers have gone.")
@farm_argument
@click.option("--workers", type=COUNT, help="As so many; on Slurm, of each kind that is missing.")
@click.option("--json", "as_json", is_flag=True, help="What was started, or the final status, as JSON on stdout.")
def resume(folder: Path, workers: int | None, as_json: bool) -> int | None:
    """Go on with a farm: submit again the workers that are neither running nor waiting, or run here what ran here.

    Nothing is done twice, whoever still works. It refuses when the prompts, the model or the parameters have changed.
    """
    from penstock.batch.farm.prepare import check_unchanged
    from penstock.batch.farm.spool import Spool
    from penstock.cluster.workers import submissions

    spool = Spool(folder.resolve())
    check_unchanged(spool)
    with contextlib.suppress(FileNotFoundError):
        spool.stop.unlink()
    if not submissions(spool.folder):
        return run_here(spool, workers, as_json)
    return _resubmit(spool, workers, as_json)


def _prepare(source: str, output: str, options: dict[str, Any]) -> Spool:
    """Make the farm, or open the same one."""
    from penstock.batch.farm.manifest import ENGINE_FIELDS, Profile, Timing, parse_profiles
    from penstock.batch.farm.prepare import Order, prepare
    from penstock.cli.options import weight_format

    common = Profile(
        **{name: options[name] for name in ENGINE_FIELDS if options.get(name) is not None}
        | {"quantize": weight_format(options["quantize"])}
    )
    lease = options["lease"]
    timing = Timing(
        lease=lease, beat=min(5.0, lease / 6), commit=options["commit"], idle=options["idle"], grace=options["grace"]
    )
    order = Order(
        model=options["model"],
        find=lambda name: find_model(name, options["revision"], options["offline"]),
        parameters=parameters_of(options),
        profiles={"": common, **parse_profiles(options["profiles"])},
        shard_rows=options["shard_rows"],
        timing=timing,
        stats=options["stats"],
    )
    folder = Path(output).expanduser().resolve()
    spool = prepare(order, folder, input_path(source), options["input_format"], shape_of(options))
    if spool.cancelled():
        raise UsageError(
            f"The farm in {folder} was cancelled.", "", f"`penstock farm resume {folder}` goes on with it."
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
            ledger.update()
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


def _shape(spool: Spool, partition: str, count: int, options: dict[str, Any], more: tuple[str, ...]) -> Workers:
    """The job of one partition: its profile over the options."""
    from penstock.cluster.script import Resources, seconds_of
    from penstock.cluster.workers import Workers
    from penstock.plan.site import load_site

    profile = spool.manifest.profile(partition)
    gpus = str(profile.gpus) if profile.gpus is not None else options["gpus"]
    resources = Resources(
        partition=partition,
        account=profile.account or options["account"],
        qos=profile.qos or options["qos"],
        time=profile.time or options["time"],
        gpus=None if gpus in (None, "0") else gpus,
        cpus=profile.cpus or options["cpus"],
        mem=profile.mem or options["mem"],
        constraint=profile.constraint or options["constraint"],
        more=more,
    )
    if profile.time is not None:
        seconds_of(profile.time)
    site = load_site(options["site"])
    model = Path(spool.manifest.model(partition).path)
    stage = options["stage"]
    if stage is None:
        stage = sum(file.stat().st_size for file in model.glob("*.safetensors")) >= 1e9
    return Workers(
        folder=spool.folder,
        count=count,
        resources=replace(resources, account=resources.account or getattr(site, "account", None)),
        model=str(model) if stage else None,
        modules=tuple(getattr(site, "modules", ())),
    )


def _submit(spool: Spool, shapes: list[Workers], chain: int, as_json: bool) -> None:
    from penstock.cluster.workers import submit as hand_in

    done = []
    for shape in shapes:
        after = None
        for _ in range(chain):
            entry = hand_in(shape, after)
            after = entry.job
            done.append(entry)
            print(f"job {entry.job}: {entry.workers} workers in {entry.partition}", file=sys.stderr)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(done))
    print(f"see `penstock farm status {spool.folder} --watch`", file=sys.stderr)


def _resubmit(spool: Spool, workers: int | None, as_json: bool) -> None:
    """Submit the scripts of each partition again, for the workers that are not there."""
    from penstock.cluster.workers import again, queue, submissions

    known = submissions(spool.folder)
    jobs = queue(known)
    if jobs is None:
        raise EnvironmentFault(
            "Slurm does not say which workers of this farm run.", "", "Try again on a login node, in a minute."
        )
    latest = {entry.partition: entry for entry in known}
    started = []
    for partition, entry in latest.items():
        there = jobs.running.get(partition, 0) + jobs.waiting.get(partition, 0)
        wanted = (workers or max(e.workers for e in known if e.partition == partition)) - there
        if wanted > 0:
            started.append(again(spool.folder, entry, wanted))
            print(f"job {started[-1].job}: {wanted} workers in {partition}", file=sys.stderr)
        else:
            print(f"{partition}: {there} workers are there already", file=sys.stderr)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(started))
