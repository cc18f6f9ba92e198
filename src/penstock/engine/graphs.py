"""Captured steps of decoding: what a processor would say to a GPU a few hundred times is said once.

A graph is of one batch size; a smaller batch is filled up with runs that read and write nothing. Graphs are captured
when a server has nothing to do, or when a size has been used a few times, and share one pool of memory. Steps that
compute otherwise have graphs of their own: the step of a deterministic sequence, and those whose rows all go through
one adapter. Where rows go through different ones, or only some through any, the shapes of the products follow from who
is in the batch, and there would be a graph for every combination: such steps are run as they are.
"""

from __future__ import annotations

import gc
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from penstock.engine.rows import DeviceRows, Packed
from penstock.models.lora import Adapter

log = logging.getLogger("penstock.engine")

_WORTH = 3  # steps of a size before it is captured while requests wait

Outcome = tuple[Tensor, Tensor, Tensor]  # logits, their largest and where it is
Compute = Callable[[Tensor, Tensor, Tensor, bool, Adapter | None], Outcome]


@dataclass(frozen=True)
class Captured:
    """inputs: [3, size] int64, the first that `Compute` is given; outcome: what it gave, the same memory at every
    replay."""

    graph: torch.cuda.CUDAGraph
    size: int
    inputs: Tensor
    outcome: Outcome


@dataclass(frozen=True)
class _Way:
    """The graphs of steps that compute alike, by size; None where capturing failed. used: steps that had none yet."""

    graphs: dict[int, Captured | None] = field(default_factory=dict)
    used: Counter[int] = field(default_factory=Counter)


class DecodeGraphs:
    """compute: ids, rows and contexts of a batch of single tokens, whether it is of a deterministic sequence, and the
    adapter of all -> their outcome; nothing in it may wait for the device. sizes: the batches that are captured."""

    def __init__(self, compute: Compute, rows: DeviceRows, sizes: tuple[int, ...]) -> None:
        self._compute, self._rows = compute, rows
        self.sizes = usable_sizes(sizes, rows.count)
        self._plain, self._alone = _Way(), _Way()
        self._adapted: WeakKeyDictionary[Adapter, _Way] = WeakKeyDictionary()  # an adapter's graphs go with it
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # one for all: the vendor's library keeps memory for each

    def find(self, count: int, alone: bool = False, adapter: Adapter | None = None) -> Captured | None:
        """What to replay for so many runs; None where that step is not captured, or not yet. alone: the one run is of a
        deterministic sequence; adapter: of all of them."""
        place = bisect_left(self.sizes, count)
        if place == len(self.sizes):
            return None
        size = 1 if alone else self.sizes[place]
        way = self._way(alone, adapter)
        if size not in way.graphs:
            way.used[size] += 1
            if way.used[size] < _WORTH or not self._has_room(adapter):
                return None
            self.capture(size, alone, adapter)
        return way.graphs[size]

    @property
    def captured(self) -> int:
        """How many sizes of the usual step are captured."""
        return sum(graph is not None for graph in self._plain.graphs.values())

    def capture_next(self) -> bool:
        """Capture one more size. Returns whether others are left."""
        missing = [size for size in self.sizes if size not in self._plain.graphs]
        if missing:
            self.capture(missing[0])
        return len(missing) > 1

    def capture(self, size: int, alone: bool = False, adapter: Adapter | None = None) -> None:
        """Capture the step of a size; where that fails, which is no harm, it is not tried again."""
        way = self._way(alone, adapter)
        try:
            way.graphs[size] = self._captured(size, alone, adapter)
        except Exception as error:  # memory, or what a driver or a compiler says: such steps are then run as they are
            log.warning("steps of %d sequences are not captured: %s: %.200s", size, type(error).__name__, error)
            way.graphs[size] = None

    def _way(self, alone: bool, adapter: Adapter | None) -> _Way:
        if adapter is not None:
            return self._adapted.setdefault(adapter, _Way())
        return self._alone if alone else self._plain

    def _has_room(self, adapter: Adapter | None) -> bool:
        """Whether the memory that is set aside allows one more graph: adapters have as many together as there are
        sizes."""
        return adapter is None or sum(len(way.graphs) for way in self._adapted.values()) < len(self.sizes)

    def _captured(self, size: int, alone: bool, adapter: Adapter | None) -> Captured:
        inputs = torch.zeros((3, size), dtype=torch.int64, device=self._rows.device)
        inputs[1] = self._rows.count
        ids, index, contexts = inputs.unbind()
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream, current = self._stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        with torch.cuda.stream(stream):
            self._compute(
                ids, index, contexts, alone, adapter
            )  # compiles kernels and fills caches, which cannot be captured
            torch.cuda.synchronize()
            gc.disable()  # freeing memory now would end the capture
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    outcome = self._compute(ids, index, contexts, alone, adapter)
                finally:
                    graph.capture_end()
            finally:
                if collects:
                    gc.enable()
        current.wait_stream(stream)
        return Captured(graph, size, inputs, outcome)

    def replay(self, captured: Captured, packed: Packed) -> Outcome:
        """Run a captured step. packed: filled up to its size. The outcome holds until the next replay."""
        ids, index, contexts, *_rest = self._rows.receive(packed)
        torch.stack((ids, index, contexts), out=captured.inputs)
        captured.graph.replay()
        return captured.outcome


def graph_count(sizes: tuple[int, ...], adapters: bool) -> int:
    """How many graphs there may come to be. adapters: requests may have one."""
    return (1 + adapters) * len(sizes) + 1 if sizes else 0


def usable_sizes(sizes: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Those of the sizes that `rows` sequences can use, and `rows` itself where a larger one was asked for."""
    fitting = sorted({size for size in sizes if 0 < size <= rows})
    if any(size > rows for size in sizes) and rows not in fitting:
        fitting.append(rows)
    return tuple(fitting)
