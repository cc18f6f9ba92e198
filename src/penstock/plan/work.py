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


class Pair(Protocol):
    """What counts here of an EncoderDecoderConfig."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def encoder_layers(self) -> int: ...
    @property
    def decoder_layers(self) -> int: ...
    @property
    def inner_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def gated(self) -> bool: ...


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

    def step(self, runs: Iterable[tuple[int, ...]], scored: int) -> Work:
        """The work of one step.

        runs: (tokens computed, tokens cached before them) of each; what follows is not looked at. scored: rows that the
        output matrix is for. The weights are read once however many tokens there are; of experts, as many as the tokens
        can choose. Keys and values count once a run: written, and read by all of the run's tokens together.
        """
        tokens = moved = seen = 0
        for length, before, *_more in runs:
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


@dataclass(frozen=True)
class PairCost:
    """What the steps of an encoder-decoder cost.

    encoder, decoder: parameters of the layers' matrices that every token of the one and of the other uses; between:
    those that make the keys and values which the decoder sees of a text; head: of the output matrix; weight_size: bytes
    of one parameter as it is stored; kv_size: bytes of one token's keys and values in all layers of the decoder;
    encoder_scores, decoder_scores: operations of one token's attention to one other in all layers.
    """

    encoder: int
    decoder: int
    between: int
    head: int
    weight_size: float
    kv_size: float
    encoder_scores: int
    decoder_scores: int

    @classmethod
    def of(cls, pair: Pair, weight_size: float, kv_item: float) -> PairCost:
        """weight_size: bytes of a stored weight; kv_item: bytes of one number in the cache."""
        square = pair.hidden_size * pair.inner_size
        mlp = (3 if pair.gated else 2) * pair.hidden_size * pair.intermediate_size
        return cls(
            encoder=pair.encoder_layers * (4 * square + mlp),
            decoder=pair.decoder_layers * (6 * square + mlp),
            between=pair.decoder_layers * 2 * square,
            head=pair.vocab_size * pair.hidden_size,
            weight_size=weight_size,
            kv_size=2 * pair.decoder_layers * pair.inner_size * kv_item,
            encoder_scores=4 * pair.encoder_layers * pair.inner_size,
            decoder_scores=4 * pair.decoder_layers * pair.inner_size,
        )

    def step(self, runs: Iterable[tuple[int, ...]], scored: int) -> Work:
        """The work of one step, counted as StepCost does.

        runs: (tokens computed, tokens cached before them, the encoder's share of the sequence) of each; scored: rows
        that the output matrix is for.
        """
        read = written = moved = within = seen = 0
        for length, before, encoded in runs:
            fresh = encoded if before == 0 else 0
            read += fresh
            within += fresh * fresh
            own, known = length - fresh, max(0, before - encoded)
            written += own
            seen += own * (encoded + known) + own * (own + 1) // 2
            moved += fresh + 2 * own + (encoded + known if own else 0)
        used = (self.encoder + self.between) * (read > 0) + self.decoder * (written > 0) + self.head * (scored > 0)
        products = (self.encoder + self.between) * read + self.decoder * written + self.head * scored
        return Work(
            weight_bytes=used * self.weight_size,
            kv_bytes=moved * self.kv_size,
            flops=2.0 * products + float(within) * self.encoder_scores + float(seen) * self.decoder_scores,
        )

    @property
    def parameters(self) -> int:
        """All that is stored of the layers' matrices."""
        return self.encoder + self.decoder + self.between
