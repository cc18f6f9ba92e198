"""What the decoder is given for one step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from penstock.devices.cpu import zeros_on_demand
from penstock.kernels.attention import PagedBatch, RunGroup
from penstock.kernels.byte_cache import width
from penstock.kernels.relative import TextGroup
from penstock.models.lora import RowAdapters

KVCache = list[tuple[Tensor, Tensor]]  # per layer keys and values, [blocks, kv_heads, block_size, head_width]


def empty_cache(layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> KVCache:
    """A cache without anything in it. Zeroed, because stale infinities would poison the padding of attention.

    dtype: int8 for bytes with scales (kernels.byte_cache).
    """
    shape = (*shape[:3], width(shape[3], dtype))
    return [(zeros_on_demand(shape, dtype, huge=True), zeros_on_demand(shape, dtype, huge=True)) for _ in range(layers)]


def cache_on(device: torch.device, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype) -> KVCache:
    """The same on a device, in one piece, so that nothing is lost between its parts."""
    whole = torch.zeros(2 * layers * prod(shape) * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype)
    keys, values = whole.view(2, layers, *shape).unbind()
    return list(zip(keys.unbind(), values.unbind(), strict=True))


@dataclass(frozen=True)
class Wanted:
    """The rows of a step whose result is needed, and how they attend as runs of length 1, in the same order."""

    rows: Tensor  # [R] int64
    groups: list[RunGroup] | list[PagedBatch]


@dataclass(frozen=True)
class ImageRows:
    """Rows of a step that are not a token's embedding but part of an image."""

    rows: Tensor  # [n] int64
    features: Tensor  # [n, hidden]


@dataclass(frozen=True)
class EncoderInputs:
    """What an encoder reads in a step, a flat batch of whole texts, and where the decoder's tokens see it.

    ids: [E]. slots: [E] where the keys and values that the decoder sees go in the cache, None where nothing will be
    decoded. crosses: the cached blocks of its text for each row of the step, as runs of length 1.
    """

    ids: Tensor
    slots: Tensor | None
    groups: list[TextGroup]
    crosses: list[RunGroup]


@dataclass(frozen=True)
class StepInputs:
    """What one step computes: a flat batch of T tokens, run after run.

    ids, positions: [T] each token and its place in its sequence. spans: [T] or None, see Rotary. slots: [T] where its
    key and value go in the cache. groups: the cached blocks that each run attends to, in the order of the rows. wanted:
    None where every row is. A prompt's other rows are there for their keys and values alone, so the last layer does
    nothing else for them. adapters: None where no row has one. encoder: of models that have one; T is then of the
    decoder's tokens, positions are theirs. axes: [3, T] the places that the parts of a head are rotated by (see
    RopeConfig.sections), None where they are `positions`. images: None where the step has none.
    """

    ids: Tensor
    positions: Tensor
    spans: Tensor | None
    slots: Tensor
    groups: list[RunGroup] | list[PagedBatch]
    wanted: Wanted | None = None
    adapters: RowAdapters | None = None
    encoder: EncoderInputs | None = None
    axes: Tensor | None = None
    images: ImageRows | None = None

    def to(self, device: torch.device) -> StepInputs:
        """The same on a device. The groups of runs stay as they are: who computes there asks them for what it needs."""
        if device.type == "cpu":
            return self

        def sent(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device)

        wanted, adapters, texts, images = self.wanted, self.adapters, self.encoder, self.images
        if wanted is not None:
            wanted = replace(wanted, rows=wanted.rows.to(device))
        if adapters is not None:
            adapters = replace(adapters, owners=sent(adapters.owners))
        if texts is not None:
            texts = replace(texts, ids=texts.ids.to(device), slots=sent(texts.slots))
        if images is not None:
            images = ImageRows(images.rows.to(device), images.features.to(device))
        return replace(
            self,
            ids=self.ids.to(device),
            positions=self.positions.to(device),
            spans=sent(self.spans),
            slots=self.slots.to(device, torch.int32),
            wanted=wanted,
            adapters=adapters,
            encoder=texts,
            axes=sent(self.axes),
            images=images,
        )
