"""Positions by distance: each head adds a score to a query and a key that lie so far apart (Raffel et al. 2020, T5)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.attention import SLICE, Rule, RunGroup, attend_gathered


@dataclass(frozen=True)
class TextGroup:
    """Whole texts of one length: rows [start, start + batch * length) of a flat batch."""

    start: int
    length: int
    batch: int

    @property
    def end(self) -> int:
        return self.start + self.batch * self.length


@dataclass(frozen=True)
class BiasBehind:
    """What each head adds by how far a key is behind the query. table: [heads, n + 1], of what lies farther the last;
    backwards: the same up to the longest context, [heads, positions] float32, distance 0 last."""

    table: Tensor
    backwards: Tensor

    @classmethod
    def of(cls, table: Tensor, positions: int) -> BiasBehind:
        distances = torch.arange(positions - 1, -1, -1, device=table.device).clamp(max=table.shape[1] - 1)
        return cls(table, table[:, distances].float())


def buckets_of(offsets: Tensor, count: int, max_distance: int, both_ways: bool) -> Tensor:
    """The bucket of each offset, key's place minus query's: near ones have their own, far ones share, by the logarithm
    of the distance up to `max_distance`. both_ways: half of the buckets are for keys ahead, which else count as 0.

    A logarithm that is rounded at a border falls on one side or the other by the order of the operations; models are
    trained with this one.
    """
    half = count // 2 if both_ways else count
    near = half // 2
    distance = offsets.abs() if both_ways else (-offsets).clamp(min=0)
    share = torch.log(distance.clamp(min=1).float() / near) / math.log(max_distance / near)
    bucket = torch.where(distance < near, distance, (near + (share * (half - near)).long()).clamp(max=half - 1))
    return bucket + (offsets > 0) * half if both_ways else bucket


def bias_table(weight: Tensor, max_distance: int, both_ways: bool) -> Tensor:
    """What each head adds. weight: [buckets, heads] -> [heads, 2 * n + 1] for offsets -n to n where `both_ways`, else
    [heads, n + 1] for keys 0 to n behind the query. What lies farther is as the outermost."""
    n = 2 * max_distance  # well beyond the last border
    offsets = torch.arange(-n, n + 1) if both_ways else -torch.arange(n + 1)
    buckets = buckets_of(offsets, len(weight), max_distance, both_ways)
    return weight[buckets.to(weight.device)].T.contiguous()


def spread(table: Tensor, longest: int) -> Tensor:
    """A table of both ways for every offset within a text of `longest` tokens. -> [heads, 2 * longest - 1]"""
    n = table.shape[1] // 2
    return table[:, torch.arange(1 - longest, longest, device=table.device).clamp(-n, n) + n]


def attend_within(q: Tensor, k: Tensor, v: Tensor, texts: list[TextGroup], bias: Tensor) -> Tensor:
    """Attention in which every token of a text sees all of it; the scores are not scaled, `bias` is added.

    q, k, v: [T, heads, dim]; bias: [heads, 2 * n - 1], as `spread` makes it for texts of up to n. -> [T, heads * dim]
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    middle = bias.shape[1] // 2
    for group in texts:
        n = group.length
        queries, keys, values, mixed = (
            rows[group.start : group.end].unflatten(0, (group.batch, n)).transpose(1, 2) for rows in (q, k, v, out)
        )
        # query i adds bias[middle - i :][:n]: with the queries last first these are windows that move to the right, so
        # that the matrix of biases is a view
        windows = bias[:, middle - n + 1 : middle + n].unfold(1, n, 1)  # [heads, n, n]
        queries = queries.flip(2)
        for first in range(0, n, SLICE):
            added = windows[:, first : first + SLICE].unsqueeze(0)
            part = F.scaled_dot_product_attention(
                queries[:, :, first : first + SLICE],
                keys,
                values,
                attn_mask=added.contiguous() if q.is_cuda else added,  # kernels there want rows that are aligned
                scale=1.0,
            )
            stop = n - first
            mixed[:, :, max(0, stop - SLICE) : stop] = part.flip(2)
    return out.flatten(1)


def paged_relative_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, groups: list[RunGroup], bias: BiasBehind
) -> Tensor:
    """`paged_attention` whose scores are not scaled and have a bias by distance. q: [T, heads, dim], contiguous ->
    [T, heads * dim].

    A single query sees its keys' distances in their order, so the compiled kernel takes them for a bias by place.
    """
    out = torch.empty_like(q)
    compiled = native.can_attend(q, k_cache)
    for group in groups:
        rows, result = q[group.start : group.end], out[group.start : group.end]
        if not compiled or group.length > 1 or max(group.contexts) > bias.backwards.shape[1]:
            attend_gathered(rows, result, k_cache, v_cache, group, Rule(1.0, relative=bias.table))
            continue
        first = 0
        for context, same in groupby(group.contexts):
            part = slice(first, first + len(list(same)))
            by_place, blocks, ends = bias.backwards[:, -context:], group.blocks[part], group.ends[part]
            native.attend(rows[part], result[part], k_cache, v_cache, blocks, ends, 1.0, alibi=by_place)
            first = part.stop
    return out.flatten(1)
