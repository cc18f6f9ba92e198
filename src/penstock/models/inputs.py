"""What the decoder is given for one step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels.attention import PagedBatch, RunGroup
from penstock.models.lora import RowAdapters

KVCache = list[tuple[Tensor, Tensor]]  # per layer keys and values, [blocks, kv_heads, block_size, head_width]


@dataclass(frozen=True)
class Wanted:
    """The rows of a step whose result is needed, and how they attend as runs of length 1, in the same order."""

    rows: Tensor  # [R] int64
    groups: list[RunGroup] | list[PagedBatch]


@dataclass(frozen=True)
class StepInputs:
    """What one step computes: a flat batch of T tokens, run after run.

    ids, positions: [T] each token and its place in its sequence. spans: [T] or None, see Rotary. slots: [T] where its
    key and value go in the cache. groups: the cached blocks that each run attends to, in the order of the rows. wanted:
    None where every row is. A prompt's other rows are there for their keys and values alone, so the last layer does
    nothing else for them. adapters: None where no row has one.
    """

    ids: Tensor
    positions: Tensor
    spans: Tensor | None
    slots: Tensor
    groups: list[RunGroup] | list[PagedBatch]
    wanted: Wanted | None = None
    adapters: RowAdapters | None = None
