"""`penstock plan`: from config.json to memory, speed and the options of sbatch, before anything is fetched."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from penstock.cli.options import COUNT, KV_DTYPES, FiniteFloat, source_options, stack
from penstock.errors import UsageError

if TYPE_CHECKING:
    from penstock.cli.plan_model import Described
    from penstock.plan.fit import Plan
    from penstock.plan.hardware import Device
    from penstock.plan.sbatch import Place
    from penstock.plan.site import Site

hardware_options = stack(
    click.option(
        "--gpu", metavar="NAME", help="A card, or a slice of one: a100-80, a100-80:3g.40gb.  [see --gpus-known]"
    ),
    click.option("--gpus", type=COUNT, help="How many cards.  [default: the fewest that hold the model, at most 8]"),
    click.option("--cpu", is_flag=True, help="Processors instead of cards."),
    click.option("--cores", type=COUNT, help="With --cpu: processors of the node."),
    click.option("--memory", type=FiniteFloat(0, above_low=True), metavar="GIB", help="With --cpu: its memory."),
    click.option("--site", metavar="NAME", help="Plan for a site: a shipped profile or a file (`penstock site show`)."),
    click.option("--partition", help="Of the site.  [default: its default one, then the others]"),
)


@click.command(short_help="What a model needs, whether it fits, how fast it will be, and the sbatch options.")
@click.argument("model", required=False)
@hardware_options
@click.option(
    "--format", "form", metavar="NAME", help="Of the weights.  [default: the checkpoint's, smaller if needed]"
)
@click.option("--tokens", type=COUNT, help="Prompt and answer of a sequence.  [default: the model's, at most 4096]")
@click.option("--batch", type=COUNT, help="Sequences side by side.  [default: as many as fit, at most 256]")
@click.option("--kv-cache-dtype", type=click.Choice(KV_DTYPES), help="As the engine's.  [default: what is computed in]")
@click.option("--disk", type=FiniteFloat(0, above_low=True), metavar="GB/S", help="Speed of the storage.  [default: 1]")
@click.option(
    "--time", "time_limit", metavar="D-HH:MM:SS", help="Time limit in the sbatch options.  [default: 4:00:00]"
)
@click.option("--measured", "files", multiple=True, metavar="FILE", help="Compare with `penstock bench static --json`.")
@click.option("--table", "as_table", is_flag=True, help="The resource table of the well-known models, as Markdown.")
@click.option("--gpus-known", is_flag=True, help="List the cards and slices that --gpu takes.")
@source_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def plan(
    model: str | None,
    gpu: str | None,
    gpus: int | None,
    cpu: bool,
    cores: int | None,
    memory: float | None,
    site: str | None,
    partition: str | None,
    form: str | None,
    tokens: int | None,
    batch: int | None,
    kv_cache_dtype: str | None,
    disk: float | None,
    time_limit: str | None,
    files: tuple[str, ...],
    as_table: bool,
    gpus_known: bool,
    revision: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Plan MODEL on some hardware: this machine, a card, a node without cards, or a site's nodes.

    Nothing but config.json is read; for well-known models not even that is fetched. With --site the smallest part of
    a node that holds the model is chosen, MIG slices included.
    """
    from penstock.plan.site import load_site

    if gpus_known:
        return _list_cards(as_json)
    if as_table:
        return _table(site, partition, as_json)
    if model is None:
        raise UsageError("Which model?", "", "penstock plan MODEL, or penstock plan --table")
    if cpu and gpu:
        raise UsageError("--gpu and --cpu exclude each other.")
    if (cores or memory) and not cpu:
        raise UsageError("--cores and --memory describe a node without cards.", "", "Add --cpu.")
    from penstock.cli.plan_model import describe_model
    from penstock.cli.plan_report import plan_report, plan_text

    described = describe_model(model, revision, offline)
    profile = load_site(site)
    length = tokens or min(described.shape.max_positions, 4096)
    speed = (disk or profile.disk_gb_s or 1.0) * 1e9
    choices, nodes = _hardware(profile if site or partition else None, partition, gpu, cpu, cores, memory)
    if kv_cache_dtype:
        described = _with_cache(described, kv_cache_dtype, choices)
    best, place = _choose(described, form, choices, nodes, gpus, length, speed, batch)
    report = plan_report(described, best, profile, place, time_limit, files, speed, batch)
    click.echo(json.dumps(report) if as_json else plan_text(report))


def _hardware(
    site: Site | None, partition: str | None, gpu: str | None, cpu: bool, cores: int | None, memory: float | None
) -> tuple[list[tuple[Device, int | None]], list[Place | None]]:
    """What to plan for, in the order of preference: devices with the most cards of each, and the site's nodes."""
    from penstock.plan.hardware import GIB, cpu_node
    from penstock.plan.hardware import gpu as card
    from penstock.plan.sbatch import Place, places
    from penstock.plan.site import NodeKind, Partition

    if site is not None and site.partitions:
        wanted = card(gpu).name if gpu else None
        found = [
            place
            for place in places(site, partition)
            if place.device.is_cpu == cpu and wanted in (None, place.device.name)
        ]
        if not found:
            what = gpu or ("nodes without cards" if cpu else "cards that Penstock knows")
            raise UsageError(
                f"{site.title or site.name} has no {what}" + (f" in partition {partition}." if partition else "."),
                "",
                "`penstock site show` lists what it has; without --site, plan for the card alone.",
            )
        found.sort(key=lambda place: place.device.memory)
        return [(place.device, place.max_cards) for place in found], list(found)
    if gpu:
        return [(card(gpu), None)], [None]
    if cpu and (cores or memory):
        kind = NodeKind(cpus=cores or 64, memory_gib=memory or 256)
        node = cpu_node(kind.cpus, int(kind.memory_gib * GIB))
        return [(node, 1)], [Place(Partition(), kind, node, 1)]
    from penstock.cli.plan_here import cards, measured_processors
    from penstock.devices.threads import usable_cores

    here = None if cpu else cards()
    if here:
        return [here], [None]
    processors = measured_processors()
    return [(processors, 1)], [Place(Partition(), NodeKind(cpus=usable_cores()), processors, 1)]


def _with_cache(described: Described, kv_dtype: str, choices: list[tuple[Device, int | None]]) -> Described:
    """The model with its cache in another type. Raises UsageError where the engine has no such cache."""
    if any(device.is_cpu != (kv_dtype == "int8") for device, _ in choices):
        raise UsageError("An int8 KV cache is for processors, one of fp8 for GPUs.", "", "Give the other, or neither.")
    return replace(described, shape=replace(described.shape, kv_dtype=kv_dtype))


def _choose(
    described: Described,
    form: str | None,
    choices: list[tuple[Device, int | None]],
    nodes: list[Place | None],
    cards: int | None,
    tokens: int,
    disk: float,
    batch: int | None,
) -> tuple[Plan, Place | None]:
    """What holds the checkpoint's own format with the fewest cards and then the least memory; else what holds a smaller
    one; else the last, which says that it does not fit."""
    from penstock.plan.fit import MAX_CARDS, best_plan, plan_on

    plans: list[tuple[Plan, Place | None]] = []
    for (device, most), node in zip(choices, nodes, strict=True):
        if form:
            counts = [cards] if cards else [n for n in (1, 2, 4, 8) if n <= (most or MAX_CARDS)]
            tried = [plan_on(described.shape, form, device, n, tokens, disk, batch) for n in counts]
            plans.append((next((p for p in tried if p.fits), tried[-1]), node))
        else:
            best = best_plan(
                described.shape, _stored(described, device), device, tokens, disk, cards, batch, most or MAX_CARDS
            )
            plans.append((best, node))
    fitting = [pair for pair in plans if pair[0].fits]
    own = [pair for pair in fitting if pair[0].weights >= 0.9 * described.stored_bytes()]
    if own or fitting:
        return min(own or fitting, key=lambda pair: (pair[0].cards, pair[0].device.memory))
    return plans[-1]


def _stored(described: Described, device: Device) -> str:
    """The format in which this machine's engine keeps the checkpoint; elsewhere its own."""
    from penstock.plan.weights import HALVES

    if device.name == "here" and described.stored in HALVES:
        from penstock.devices.cpu import choose_dtype
        from penstock.kernels.products import COMPILED

        return str(choose_dtype("auto", described.stored, COMPILED, quantized=False)[0]).removeprefix("torch.")
    return described.stored


def _list_cards(as_json: bool) -> None:
    from penstock.plan.hardware import GIB, gpu, known_gpus

    cards = [(name, gpu(name)) for name in known_gpus()]
    if as_json:
        click.echo(json.dumps([{"name": name, "title": c.title, "memory_bytes": c.memory} for name, c in cards]))
        return
    for name, card in cards:
        click.echo(f"{name:<18} {card.memory / GIB:6.1f} GiB  {card.bandwidth / 1e9:5.0f} GB/s  {card.title}")


def _table(site: str | None, partition: str | None, as_json: bool) -> None:
    from penstock.plan.sbatch import places
    from penstock.plan.site import GENERIC, load_site
    from penstock.plan.table import markdown, rows

    profile = load_site(site or GENERIC)
    table = list(rows(profile, places(profile, partition) if profile.partitions else []))
    if not as_json:
        click.echo(markdown(table))
        return
    click.echo(json.dumps([
        {
            "model": row.model, "hub": row.hub, "hardware": row.plan.device.name, "gpus": row.plan.cards,
            "format": row.plan.form, "weight_bytes": row.plan.weights, "fits": row.plan.fits,
            "sequence_tokens": row.plan.tokens, "max_sequences": row.plan.sequences,
            "tokens_per_second": round(row.plan.tokens_per_second, 2),
            "batch_tokens_per_second": round(row.plan.batch_tokens_per_second, 2), "sbatch": list(row.sbatch),
        }
        for row in table
    ]))  # fmt: skip
