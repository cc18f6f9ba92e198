"""Captured steps of decoding: what a processor would say to a GPU a few hundred times is said once.

A graph is of one batch size; a smaller batch is filled up with runs that read and write nothing. Graphs are captured
when a server has nothing to do, or when a size has been used a few times, and share one pool of memory.
"""

from __future__ import annotations

import gc
import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from penstock.engine.rows import DeviceRows, Packed

log = logging.getLogger("penstock.engine")

_WORTH = 3  # steps of a size before it is captured while requests wait

Outcome = tuple[Tensor, Tensor, Tensor]  # logits, their largest and where it is
Compute = Callable[[Tensor, Tensor, Tensor], Outcome]


@dataclass(frozen=True)
class _Graph:
    """inputs: [3, size] int64, what `Compute` is given; outcome: what it gave, the same memory at every replay."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    outcome: Outcome


class DecodeGraphs:
    """compute: ids, rows and contexts of a batch of single tokens -> their outcome; nothing in it may wait for the
    device. sizes: the batches that are captured."""

    def __init__(self, compute: Compute, rows: DeviceRows, sizes: tuple[int, ...]) -> None:
        self._compute, self._rows = compute, rows
        self.sizes = usable_sizes(sizes, rows.count)
        self._graphs: dict[int, _Graph] = {}
        self._used: Counter[int] = Counter()
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # one for all: the vendor's library keeps memory for each

    def size_for(self, count: int) -> int | None:
        """The size to replay for so many runs; None where that step is not captured, or not yet."""
        place = bisect_left(self.sizes, count)
        if place == len(self.sizes):
            return None
        size = self.sizes[place]
        if size not in self._graphs:
            self._used[size] += 1
            if self._used[size] < _WORTH or not self.capture(size):
                return None
        return size

    def capture_next(self) -> bool:
        """Capture one more size. Returns whether others are left."""
        missing = [size for size in self.sizes if size not in self._graphs]
        if missing:
            self.capture(missing[0])
        return len(missing) > 1

    def capture(self, size: int) -> bool:
        """Capture the step of a size; where that fails, which is no harm, the size is given up."""
        try:
            self._graphs[size] = self._captured(size)
        except Exception as error:  # memory, or what a driver or a compiler says: such steps are then run as they are
            log.warning("steps of %d sequences are not captured: %s: %.200s", size, type(error).__name__, error)
            self.sizes = tuple(other for other in self.sizes if other != size)
        return size in self._graphs

    def _captured(self, size: int) -> _Graph:
        inputs = torch.zeros((3, size), dtype=torch.int64, device=self._rows.device)
        inputs[1] = self._rows.count
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream, current = self._stream, torch.cuda.current_stream()
        stream.wait_stream(current)
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        with torch.cuda.stream(stream):
            self._compute(*inputs)  # compiles kernels and fills caches, which cannot be captured
            torch.cuda.synchronize()
            gc.disable()  # freeing memory now would end the capture
            try:
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    outcome = self._compute(*inputs)
                finally:
                    graph.capture_end()
            finally:
                if collects:
                    gc.enable()
        current.wait_stream(stream)
        return _Graph(graph, inputs, outcome)

    def replay(self, size: int, packed: Packed) -> Outcome:
        """Run a captured step. packed: filled up to the size. The outcome holds until the next replay."""
        captured = self._graphs[size]
        ids, index, contexts, *_rest = self._rows.receive(packed)
        torch.stack((ids, index, contexts), out=captured.inputs)
        captured.graph.replay()
        return captured.outcome


def usable_sizes(sizes: tuple[int, ...], rows: int) -> tuple[int, ...]:
    """Those of the sizes that `rows` sequences can use, and `rows` itself where a larger one was asked for."""
    fitting = sorted({size for size in sizes if 0 < size <= rows})
    if any(size > rows for size in sizes) and rows not in fitting:
        fitting.append(rows)
    return tuple(fitting)
