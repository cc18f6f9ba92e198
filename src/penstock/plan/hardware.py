"""What a model may run on: cards and their slices from a data file, nodes without cards, this machine."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import msgspec

from penstock.errors import UsageError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One card, one slice of a card, or the processors of one node.

    memory: bytes that a process may use; bandwidth: bytes a second; flops: operations a second by data type; link:
    bytes a second to the next card. read_share, compute_share: what of bandwidth and flops a decoding step reaches;
    prompt_share: what of flops a long prompt reaches; type_share: what of read_share products of a type reach, where
    it is less; layer_seconds, row_seconds: what a layer of a step takes besides, and each of its sequences;
    overlap_loss: what of the shorter of reading and computing the longer does not hide; exchange_seconds: one
    all-reduce of a sharded model; runtime: bytes that the driver, the libraries and captured graphs keep.
    """

    name: str
    title: str
    memory: int
    bandwidth: float
    flops: dict[str, float]
    link: float = 0.0
    read_share: float = 1.0
    compute_share: float = 1.0
    prompt_share: float = 1.0
    layer_seconds: float = 0.0
    row_seconds: float = 0.0
    overlap_loss: float = 0.0
    exchange_seconds: float = 0.0
    runtime: int = 0
    is_cpu: bool = False
    type_share: Mapping[str, float] = field(default_factory=dict)
    slices: tuple[str, ...] = ()

    def runs(self, dtype: str) -> bool:
        """Whether the silicon multiplies this type (all else is unpacked to one that it does)."""
        return dtype in self.flops


# Fitted on the published measurements in measured.toml: engines of the day reach 85 % of the data sheet's bandwidth
# inside a kernel, and lose 50 us a layer between kernels; an all-reduce of one token's activations takes 25 us.
GPU_READ_SHARE, GPU_COMPUTE_SHARE = 0.85, 0.6
GPU_LAYER_SECONDS, GPU_EXCHANGE_SECONDS = 50e-6, 25e-6
GPU_RUNTIME = 3 * GIB // 2  # context 0.5 GiB, workspaces and captured graphs 1 GiB
CPU_RUNTIME = GIB // 2  # Python with PyTorch, and the API process
CPU_TYPE_SHARE = {"float32": 0.6}  # PyTorch's own product, on weights that are not packed


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of hardware.toml. slices: name -> (sevenths of the compute, GiB)."""

    title: str
    memory_gib: float
    bandwidth: float
    tflops: dict[str, float]
    link: float = 0.0
    slices: dict[str, tuple[int, float]] = {}


@cache
def _table() -> dict[str, Card]:
    with Path(__file__).with_name("hardware.toml").open("rb") as file:
        return msgspec.convert(tomllib.load(file), dict[str, Card])


def known_gpus() -> list[str]:
    """Every name that `gpu` takes, slices included."""
    return [full for name, card in _table().items() for full in (name, *(f"{name}:{part}" for part in card.slices))]


def gpu(name: str) -> Device:
    """A card (`a100-80`; `a100` is the first of that kind) or a MIG slice of one (`a100-80:3g.40gb`, short
    `a100-80:3g`). Raises UsageError."""
    typed, colon, part = name.lower().partition(":")
    key = next((k for k in _table() if typed in (k, k.partition("-")[0])), None)
    if key is None:
        raise UsageError(
            f"There is no card {name[:60]!r} in the table.",
            f"It knows {', '.join(_table())}.",
            "MIG slices follow a colon: a100-80:3g.40gb. Without cards: --cpu.",
        )
    card = _table()[key]
    memory, bandwidth, compute, title = card.memory_gib, card.bandwidth, 1.0, card.title
    if colon:
        found = next((s for s in card.slices if part in (s, s.partition(".")[0])), None)
        if found is None:
            raise UsageError(
                f"{card.title} has no slice {part[:40]!r}.", f"Its slices: {', '.join(card.slices) or 'none'}."
            )
        sevenths, memory = card.slices[found]
        bandwidth *= min(1.0, memory / card.memory_gib)
        key, title, compute = f"{key}:{found}", f"{card.title}, slice {found}", sevenths / 7
    return Device(
        name=key,
        title=title,
        memory=int(memory * GIB),
        bandwidth=bandwidth * 1e9,
        flops={dtype: value * 1e12 * compute for dtype, value in card.tflops.items()},
        link=0.0 if colon else card.link * 1e9,
        read_share=GPU_READ_SHARE,
        compute_share=GPU_COMPUTE_SHARE,
        prompt_share=GPU_COMPUTE_SHARE,
        layer_seconds=GPU_LAYER_SECONDS,
        exchange_seconds=GPU_EXCHANGE_SECONDS,
        runtime=GPU_RUNTIME,
        slices=() if colon else tuple(f"{key}:{part}" for part in card.slices),
    )


# A core of a server processor of the last years: what a node's memory gives each, and its products in AVX-512 or AVX2.
CORE_BANDWIDTH, NODE_BANDWIDTH, CORE_FLOPS = 6e9, 350e9, 60e9


def cpu_node(cores: int, memory: int, name: str = "cpu") -> Device:
    """A node of which only the number of processors and the memory are known: a cautious estimate of its speed."""
    return Device(
        name=name,
        title=f"{cores} processors, {memory / GIB:.0f} GiB",
        memory=memory,
        bandwidth=min(cores * CORE_BANDWIDTH, NODE_BANDWIDTH),
        flops={"float32": cores * CORE_FLOPS, "bfloat16": 2 * cores * CORE_FLOPS, "int8": 4 * cores * CORE_FLOPS},
        read_share=0.8,
        compute_share=0.4,
        prompt_share=0.7,
        layer_seconds=60e-6,
        runtime=CPU_RUNTIME,
        is_cpu=True,
        type_share=CPU_TYPE_SHARE,
    )
