"""What the decoder is given for one step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels.attention import RunGroup

KVCache = list[tuple[Tensor, Tensor]]  # per layer keys and values, [blocks, kv_heads, block_size, head_width]


@dataclass(frozen=True)
class Wanted:
    """The rows of a step whose result is needed, and how they attend as runs of length 1, in the same order."""

    rows: Tensor  # [R] int64
    groups: list[RunGroup]


@dataclass(frozen=True)
class ImageRows:
    """Rows of a step that are not a token's embedding but part of an image."""

    rows: Tensor  # [n] int64
    features: Tensor  # [n, hidden]


@dataclass(frozen=True)
class StepInputs:
    """What one step computes: a flat batch of T tokens, run after run.

    ids, positions: [T] each token and its place in its sequence. spans: [T] or None, see Rotary. slots: [T] where its
    key and value go in the cache. groups: the cached blocks that each run attends to, in the order of the rows. wanted:
    None where every row is. A prompt's other rows are there for their keys and values alone, so the last layer does
    nothing else for them. axes: [3, T] the places that the parts of a head are rotated by (see RopeConfig.sections),
    None where they are `positions`. images: None where the step has none.
    """

    ids: Tensor
    positions: Tensor
    spans: Tensor | None
    slots: Tensor
    groups: list[RunGroup]
    wanted: Wanted | None = None
    axes: Tensor | None = None
    images: ImageRows | None = None
