"""Workers of this machine: how many, on which cards or cores, and their supervisor."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from penstock.batch.farm.place import visible_cards
from penstock.batch.farm.spool import Spool
from penstock.batch.farm.supervisor import Place, Supervisor
from penstock.errors import ResourceError

_NODES = Path("/sys/devices/system/node")


def run_locally(spool: Spool, places: Sequence[Place], on_poll: Callable[[], None]) -> int:
    """Keep a worker in each place until nothing is left to do; returns the exit code."""
    return Supervisor(
        spool, lambda life, rank, place: _command(spool, "local", life, rank, place), places, on_poll
    ).run()


def supervise(spool: Spool, partition: str, rank: int, more: Sequence[str]) -> int:
    """Keep the worker of a job: one process, or one for each of its cards."""
    command = lambda life, rank, place: [*_command(spool, partition, life, rank, place), *more]  # noqa: E731
    cards = visible_cards()
    places = [_on_card(card) for card in cards] if len(cards) > 1 else [Place({}, ())]
    return Supervisor(spool, command, places, first_rank=rank * len(places)).run()


def places_here(workers: int | None) -> list[Place]:
    """One place a card, else one a memory node of the processor, or `workers` that share the cards or cores evenly."""
    cards = visible_cards() or [str(n) for n in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    if cards:
        return [_on_card(cards[i % len(cards)]) for i in range(workers or len(cards))]
    cores = sorted(os.sched_getaffinity(0))
    if workers is None:
        groups = [group for group in _memory_nodes(cores) if group]
    elif workers > len(cores):
        groups = [[cores[i % len(cores)]] for i in range(workers)]
    else:
        groups = [cores[i * len(cores) // workers : (i + 1) * len(cores) // workers] for i in range(workers)]
    if not groups:
        raise ResourceError("This process may not run on any core.")
    if len(groups) == 1:
        return [Place({}, ())]
    return [Place({"OMP_NUM_THREADS": str(len(group))}, tuple(group)) for group in groups]


def _on_card(card: str) -> Place:
    environment: Mapping[str, str] = {"CUDA_VISIBLE_DEVICES": card}
    return Place(environment, ())


def _memory_nodes(cores: list[int]) -> list[list[int]]:
    """The cores of each memory node; all of them as one where the system does not say."""
    groups = []
    for file in sorted(_NODES.glob("node[0-9]*/cpulist")):
        try:
            own = set(_numbers(file.read_text().strip()))
        except (OSError, ValueError):
            return [cores]
        groups.append([core for core in cores if core in own])
    return groups or [cores]


def _numbers(text: str) -> list[int]:
    """0-3,8 as numbers."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def _command(spool: Spool, partition: str, life: str, rank: int, place: Place) -> list[str]:
    cores = ["--cores", ",".join(map(str, place.cores))] if place.cores else []
    settings = spool.manifest.profile(partition).settings()
    return [
        *(sys.executable, "-m", "penstock.cli.main", "farm", "worker", str(spool.folder)),
        *("--partition", partition, "--rank", str(rank), "--life", life),
        *(["--settings", settings] if settings else []),
        *cores,
    ]
