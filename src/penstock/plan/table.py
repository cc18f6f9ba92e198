"""The table of resources that guides keep by hand: which cards, which sbatch options, how many sequences, how fast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from penstock.plan.fit import Plan, best_plan
from penstock.plan.hardware import GIB, cpu_node, gpu
from penstock.plan.known import known_models
from penstock.plan.odd_shapes import ENCODER_DECODERS
from penstock.plan.sbatch import Place, flags
from penstock.plan.shapes import shape_of
from penstock.plan.site import NodeKind, Partition, Site
from penstock.plan.weights import stored_format

MODELS = (
    "llama-2-7b-chat", "llama-2-13b-chat", "llama-2-70b-chat", "falcon-7b", "falcon-40b", "flan-t5-xxl", "bloomz",
    "llama-3-8b", "llama-3-70b", "mistral-7b", "starcoder2-15b", "opt-30b", "gpt-neox-20b", "bloom-176b",
    "galactica-6.7b", "galactica-30b",
)  # fmt: skip
CARDS = ("a100-80", "v100-32", "mi300x", "gaudi2", "h100-80", "h200")
CPU_NODES = ((64, 256 * GIB), (192, 750 * GIB))  # processors and memory of the nodes that many sites have
TOKENS = 2048
DISK = 2e9
_GRES = {"a100-80": "a100", "v100-32": "v100", "h100-80": "h100", "h200": "h200", "mi300x": "mi300x", "gaudi2": "gaudi"}


@dataclass(frozen=True)
class Row:
    """One model on one kind of hardware."""

    model: str
    hub: str
    plan: Plan
    sbatch: tuple[str, ...]

    @property
    def used(self) -> float:
        """The share of the memory that weights and one sequence take."""
        return self.plan.need / (self.plan.device.memory * self.plan.cards)


def rows(site: Site, places: list[Place], models: tuple[str, ...] = MODELS) -> Iterator[Row]:
    """Every model on every kind of hardware: of the site where it has any, else of the standard list.

    Of a card's MIG slices only the smallest that holds the model is a row.
    """
    found = places or [_standard(name) for name in CARDS] + [_slice(s) for s in gpu("a100-80").slices] + _nodes()
    for name in models:
        known = known_models()[name]
        shape, stored = shape_of(known.config), stored_format(known.config)
        tokens = min(TOKENS, shape.max_positions) if known.config["model_type"] not in ENCODER_DECODERS else TOKENS
        seen: set[str] = set()
        sliced: set[str] = set()
        for place in sorted(found, key=lambda p: (p.device.is_cpu, p.device.name.partition(":")[0], p.device.memory)):
            card, colon, _ = place.device.name.partition(":")
            label = f"{place.device.name}{place.kind.cpus if place.device.is_cpu else ''}"
            if label in seen or (colon and card in sliced):
                continue
            plan = best_plan(shape, stored, place.device, tokens, DISK, None, max_cards=place.max_cards)
            if colon and (not plan.fits or plan.weights < known.parameters * 1.9e9):
                continue  # a slice is worth naming when the model fits uncompressed
            seen.add(label)
            sliced |= {card} if colon else set()
            yield Row(name, known.hub, plan, tuple(flags(plan, site, place)))


def markdown(table: list[Row]) -> str:
    """The table as Markdown, a heading a model."""
    lines: list[str] = []
    for name in dict.fromkeys(row.model for row in table):
        mine = [row for row in table if row.model == name]
        shape = shape_of(known_models()[name].config)
        lines += [
            f"### {name} ({mine[0].hub}, {shape.parameters / 1e9:.1f} B parameters)",
            "",
            f"| hardware | format | weights | memory used | sequences of {mine[0].plan.tokens} | tokens/s: one, all "
            "| sbatch |",
            "|---|---|---|---|---|---|---|",
            *(_line(row) for row in mine),
            "",
        ]
    return "\n".join(lines)


def _line(row: Row) -> str:
    plan = row.plan
    where = f"{plan.cards}x {plan.device.title}" if not plan.device.is_cpu else plan.device.title
    if not plan.fits:
        return f"| {where} | {plan.form} | {plan.weights / GIB:.1f} GiB | {row.used:.0%} | does not fit | | |"
    options = " ".join(row.sbatch)
    speed = f"{plan.tokens_per_second:.3g}, {plan.batch_tokens_per_second:,.0f} ({plan.batch} rows)"
    return (
        f"| {where} | {plan.form} | {plan.weights / GIB:.1f} GiB | {row.used:.0%} | {plan.sequences} | {speed} "
        f"| `{options}` |"
    )


def _standard(name: str) -> Place:
    kind = NodeKind(cpus=64, memory_gib=1000, gpus=8, gpu=name, gres=_GRES[name])
    return Place(Partition(), kind, gpu(name), 8)


def _slice(name: str) -> Place:
    card, _, part = name.partition(":")
    kind = NodeKind(cpus=64, memory_gib=1000, gpus=16, gpu=name, gres=f"{_GRES[card]}_{part}")
    return Place(Partition(), kind, gpu(name), 1)


def _nodes() -> list[Place]:
    return [
        Place(Partition(), NodeKind(cpus=cores, memory_gib=memory / GIB), cpu_node(cores, memory), 1)
        for cores, memory in CPU_NODES
    ]
