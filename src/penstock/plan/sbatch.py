"""What to ask Slurm for: the sbatch options of a plan, and the nodes of a site that a plan may choose from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.errors import UsageError
from penstock.plan.fit import Plan
from penstock.plan.hardware import Device, cpu_node, gpu
from penstock.plan.site import NodeKind, Partition, Site

GIB = 2**30
HOST_MEMORY = 8 * GIB  # beside the staged weights: Python, PyTorch, the API process
CORES_PER_CARD, CORES_PER_SLICE = 8, 4
DEFAULT_TIME = "4:00:00"


@dataclass(frozen=True)
class Place:
    """Nodes of one kind in one partition, as something to plan for."""

    partition: Partition
    kind: NodeKind
    device: Device
    max_cards: int


def places(site: Site, partition: str | None = None) -> list[Place]:
    """Where a job of this site could run: every kind of node of the partition (None: of all, the default one first).

    Cards that the table of hardware lacks are left out. Raises UsageError for an unknown partition.
    """
    if partition is not None and partition not in site.partitions:
        raise UsageError(
            f"{site.title or site.name} has no partition {partition[:40]!r}.",
            f"Its partitions: {', '.join(site.partitions) or 'none are known'}.",
            "`penstock site show` prints the profile.",
        )
    chosen = [site.partitions[partition]] if partition is not None else list(site.partitions.values())
    chosen.sort(key=lambda p: (not p.default, p.preempted))
    return [place for p in chosen for name in p.nodes if (place := _place(p, name, site.nodes[name])) is not None]


def _place(partition: Partition, name: str, kind: NodeKind) -> Place | None:
    if kind.gpus == 0:
        memory = min(kind.memory_gib, partition.max_memory_gib or kind.memory_gib)
        cores = min(kind.cpus, partition.max_cpus or kind.cpus)
        return Place(partition, kind, cpu_node(cores, int(memory * GIB), name), 1)
    try:
        device = gpu(kind.gpu)
    except UsageError:
        return None
    most = min(kind.gpus, partition.max_gpus or kind.gpus)
    return Place(partition, kind, device, 1 if ":" in device.name else most)


def flags(plan: Plan, site: Site, place: Place | None, time: str | None = None) -> list[str]:
    """The options of `sbatch` for a plan. place: None where nothing is known of the nodes; time: Slurm's words."""
    partition = place.partition if place else None
    kind = place.kind if place else NodeKind()
    memory, cores = _host(plan, kind, partition)
    options = [f"--partition={partition.name}"] if partition and partition.name else []
    if site.account or site.account_required:
        options.append(f"--account={site.account or 'ACCOUNT'}")
    options += ["--nodes=1", "--ntasks=1"]
    if not plan.device.is_cpu:
        options.append(site.gpu_option(kind, plan.cards))
    options += [f"--cpus-per-task={cores}", f"--mem={memory}G", f"--time={_time(time, partition)}"]
    if kind.constraint:
        options.append(f"--constraint={kind.constraint}")
    return [*options, *site.sbatch]


def _host(plan: Plan, kind: NodeKind, partition: Partition | None) -> tuple[int, int]:
    """GiB of memory and processors of a job.

    With cards, the weights once more (a model staged to the RAM disk counts as the job's memory) and what the
    processes take, but at most the cards' share of their node; without, what the plan needs and all processors.
    """
    if plan.device.is_cpu:
        need = 1.1 * plan.need + GIB
        cores = min(kind.cpus or 8, partition.max_cpus or kind.cpus if partition else kind.cpus or 8)
        return math.ceil(need / GIB), max(1, cores)
    share = plan.cards / kind.gpus if kind.gpus else 0.0
    memory = math.ceil((1.05 * plan.weights + HOST_MEMORY) / GIB)
    cores = (CORES_PER_SLICE if ":" in plan.device.name else CORES_PER_CARD) * plan.cards
    if share:
        memory = min(memory, max(1, int(kind.memory_gib * share)))
        cores = min(cores, max(1, int(kind.cpus * share)))
    if partition is not None:
        memory = min(memory, int(partition.max_memory_gib) or memory)
        cores = min(cores, partition.max_cpus or cores)
    return memory, cores


def _time(asked: str | None, partition: Partition | None) -> str:
    if asked:
        return asked
    limit = partition.seconds if partition else None
    return partition.time_limit if partition and limit is not None and limit < 4 * 3600 else DEFAULT_TIME
