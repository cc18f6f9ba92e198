"""The arithmetic of a step: bytes of weights and of keys and values that it moves, and floating-point operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class ExpertsShape(Protocol):
    """What counts here of an ExpertsConfig."""

    @property
    def layers(self) -> tuple[bool, ...]: ...
    @property
    def count(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def shared_size(self) -> int: ...


class Shape(Protocol):
    """What counts here of a DecoderConfig."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def windows(self) -> tuple[int | None, ...]: ...
    @property
    def kv_elements(self) -> int: ...
    @property
    def gated(self) -> bool: ...
    @property
    def experts(self) -> ExpertsShape | None: ...


@dataclass(frozen=True)
class Work:
    """What one step moves and computes. Bytes, and floating-point operations (a multiply-add is two)."""

    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    flops: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.weight_bytes + other.weight_bytes, self.kv_bytes + other.kv_bytes, self.flops + other.flops)

    @property
    def bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True)
class StepCost:
    """What the steps of one loaded model cost.

    weights: parameters of the layers' matrices that every token uses; expert: of one expert in each layer that has
    them, 0 for none; count, top_k: experts of a layer, and how many of them a token uses; head: of the output matrix;
    weight_size: bytes of one parameter as it is stored, scales included; kv_size: bytes of one token's keys and values
    in one layer; spans: how many layers see so many tokens back at most (None: all of them); score_flops: of one
    token's attention to one other in one layer.
    """

    weights: int
    expert: int
    count: int
    top_k: int
    head: int
    weight_size: float
    kv_size: float
    spans: tuple[tuple[int | None, int], ...]
    score_flops: int

    @classmethod
    def of(cls, shape: Shape, weight_size: float, kv_item: float) -> StepCost:
        """weight_size: bytes of a stored weight; kv_item: bytes of one number in the cache."""
        attention = shape.hidden_size * shape.head_dim * (2 * shape.num_heads + 2 * shape.num_kv_heads)
        row = (3 if shape.gated else 2) * shape.hidden_size  # weights for each unit of an MLP's width
        e, routed = shape.experts, 0 if shape.experts is None else sum(shape.experts.layers)
        weights = shape.num_layers * attention + (shape.num_layers - routed) * row * shape.intermediate_size
        if e is not None:
            weights += routed * (row * e.shared_size + shape.hidden_size * e.count)
        windows = list(shape.windows) or [None] * shape.num_layers
        return cls(
            weights=weights,
            expert=0 if e is None else routed * row * e.intermediate_size,
            count=0 if e is None else e.count,
            top_k=0 if e is None else e.top_k,
            head=shape.vocab_size * shape.hidden_size,
            weight_size=weight_size,
            kv_size=shape.kv_elements / shape.num_layers * kv_item,
            spans=tuple((span, windows.count(span)) for span in dict.fromkeys(windows)),
            score_flops=4 * shape.num_heads * shape.head_dim,
        )

    def step(self, runs: Iterable[tuple[int, int]], scored: int) -> Work:
        """The work of one step.

        runs: (tokens computed, tokens cached before them) of each; scored: rows that the output matrix is for. The
        weights are read once however many tokens there are; of experts, as many as the tokens can choose. Keys and
        values count once a run: written, and read by all of the run's tokens together.
        """
        tokens = moved = seen = 0
        for length, before in runs:
            tokens += length
            for span, layers in self.spans:
                # the i-th token of a run, from 1, sees `before + i` tokens, but never more than the span
                free = length if span is None else min(length, max(0, span - before))
                seen += layers * (free * before + free * (free + 1) // 2 + (length - free) * (span or 0))
                moved += layers * (2 * length + (before if span is None else min(before, span - 1)))
        read = self.weights + self.expert * min(self.count, self.top_k * tokens) + (self.head if scored else 0)
        used = self.weights + self.expert * self.top_k
        return Work(
            weight_bytes=read * self.weight_size,
            kv_bytes=moved * self.kv_size,
            flops=2.0 * (used * tokens + self.head * scored) + float(seen) * self.score_flops,
        )

    @property
    def parameters(self) -> int:
        """All that is stored of the layers' matrices."""
        return self.weights + self.expert * self.count
