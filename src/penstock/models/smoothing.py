"""Channels that stand out in what a norm gives, evened out for the 8-bit activations behind it.

A row has one scale, so a channel that is always tens of times larger than the others leaves them few of its 8 bits.
Factors move that range into the matrix, whose quantized columns have room for it, and out of the norm's weight
(`formats.smoothed`, `fused`). Who needs it is found by letting the model write a little: where no channel stands out,
nothing is touched; where one does, the factors that lose least are kept, and none if none is better.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from penstock.formats import Format
from penstock.formats.dense import Gated, GatedPair, Linear, Plain
from penstock.formats.smoothed import Smoothed, SmoothedGated
from penstock.hub.checkpoint import TensorEntry
from penstock.kernels.attention import RunGroup
from penstock.kernels.stored import Matrix, whole
from penstock.models.attention import FusedQkv
from penstock.models.attention_weights import load_qkv
from penstock.models.config import WeightMap
from penstock.models.decoder import Decoder
from penstock.models.inputs import StepInputs
from penstock.models.mlp import GatedMlp, PlainMlp
from penstock.models.norms import Norm
from penstock.models.source import Source
from penstock.models.tensors import TensorReader
from penstock.models.weights import LayerWeights, load_mlp

_TEXTS, _LENGTH, _SECONDS = 16, 12, 2.0  # what the model writes, and for how long
_STANDS_OUT = 8  # times the median channel: the others then have 4 of the 8 bits left
_EDGE = 2  # times the median channel, down to which a channel is brought by a strength of 1
_STRENGTHS = (0.5, 0.75, 1.0)
_WORTHWHILE = 0.9  # the error that is left, of that without factors

P = TypeVar("P", Linear, Gated)


def smooth(decoder: Decoder, entries: dict[str, TensorEntry], names: WeightMap, form: Format) -> int:
    """Put factors where they lower the error of a product; returns of how many. Their matrices are read once more.

    entries, names, form: what the decoder was loaded of. Only products of a norm that feeds them alone can have some.
    """
    config, layers = decoder.config, list(decoder.weights.layers)
    if config.parallel or config.residual_normed:
        return 0
    heard = [(_Heard(layer.attention_norm), _Heard(layer.mlp_norm)) for layer in layers]
    decoder.take([_heard(layer, *norms) for layer, norms in zip(layers, heard, strict=True)])
    try:
        _write(decoder)
        read, found = TensorReader(entries, decoder.dtype, decoder.device), names.found_in(entries)
        count = 0
        for i, (before_attention, before_mlp) in enumerate(heard):
            prefix = found.base + found.layer.format(i=i)
            attention, mlp = layers[i].attention, layers[i].mlp
            if isinstance(attention.qkv, FusedQkv) and (trial := before_attention.trial(form)) is not None:
                again = load_qkv(Source(read, config, found, trial.form), prefix, i)
                if isinstance(again, FusedQkv) and trial.better:
                    qkv = replace(attention.qkv, product=again.product)
                    layers[i] = replace(layers[i], attention=replace(attention, qkv=qkv))
            if isinstance(mlp, (GatedMlp, PlainMlp)) and (trial := before_mlp.trial(form)) is not None:
                other = load_mlp(Source(read, config, found, trial.form), prefix)
                if trial.better and isinstance(mlp, GatedMlp) and isinstance(other, GatedMlp):
                    layers[i] = replace(layers[i], mlp=replace(mlp, gate_up=other.gate_up))
                elif trial.better and isinstance(mlp, PlainMlp) and isinstance(other, PlainMlp):
                    layers[i] = replace(layers[i], mlp=replace(mlp, up=other.up))
            count += (layers[i].attention is not attention) + (layers[i].mlp is not mlp)
    finally:
        decoder.take(layers)
    return count


def _heard(layer: LayerWeights, attention: _Heard, mlp: _Heard) -> LayerWeights:
    return replace(
        layer,
        attention_norm=None if layer.attention_norm is None else attention,
        mlp_norm=None if layer.mlp_norm is None else mlp,
    )


def _write(decoder: Decoder) -> None:
    """Let the model continue some tokens of its vocabulary, the likeliest each time, side by side."""
    config, until = decoder.config, time.monotonic() + _SECONDS
    length = min(_LENGTH, config.max_positions)
    cache = decoder.new_cache(_TEXTS, length)
    ids = torch.linspace(0, config.vocab_size - 1, _TEXTS).long()
    for place in range(length):
        if time.monotonic() > until and place > 1:
            return
        step = StepInputs(
            ids=ids,
            positions=torch.full((_TEXTS,), place),
            spans=None if config.span_rope is None else torch.full((_TEXTS,), length),
            slots=torch.arange(_TEXTS) * length + place,
            groups=[RunGroup(0, 1, [place + 1] * _TEXTS, torch.arange(_TEXTS).unsqueeze(1))],
        )
        ids = decoder.logits(decoder.forward(step, cache)).float().argmax(dim=1)


@dataclass(frozen=True)
class _Heard:
    """A norm, and what it gave."""

    norm: Norm | None
    given: list[Tensor] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        assert self.norm is not None  # noqa: S101 (_heard)
        h = self.norm(x)
        self.given.append(h)
        return h

    def trial(self, form: Format) -> _Trial | None:
        """Of the product behind it, where a channel stands out; None where none does."""
        if len(self.given) < 2:
            return None
        rows = torch.cat(self.given[1:])  # the first token of a text is like no other (Sun et al. 2024)
        reach = rows.abs().amax(dim=0).float()
        typical = float(reach.median())
        if not typical > 0 or not _STANDS_OUT * typical < float(reach.amax()) < float("inf"):
            return None
        excess = (reach / (_EDGE * typical)).clamp_min(1)
        return _Trial(form, rows, [torch.exp2((excess.log2() * s).round()).to(rows.dtype) for s in _STRENGTHS])


@dataclass
class _Trial:
    """Packs the first matrix that it is given with each of the factors, keeps what loses least. better: with some."""

    quantized: Format
    rows: Tensor
    factors: list[Tensor]
    better: bool = False
    _done: bool = False

    @property
    def form(self) -> Format:
        return Format(self.load, self.load_gated, None)

    def load(self, weight: Matrix, bias: Tensor | None = None) -> Linear:
        weight = whole(weight)
        if self._done:  # the way down, which no norm feeds
            return Plain(weight, bias)

        def made(factors: Tensor | None) -> Linear:
            if factors is None:
                return self.quantized.load(weight, bias)
            return Smoothed(self.quantized.load(weight * factors, bias), 1 / factors)

        return self._best(Plain(weight, bias), made)

    def load_gated(
        self,
        gate: Matrix,
        up: Matrix,
        activation: str,
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
    ) -> Gated:
        gate, up = whole(gate), whole(up)

        def made(factors: Tensor | None) -> Gated:
            if factors is None:
                return self.quantized.load_gated(gate, up, activation, gate_bias, up_bias)
            product = self.quantized.load_gated(gate * factors, up * factors, activation, gate_bias, up_bias)
            return SmoothedGated(product, 1 / factors)

        return self._best(GatedPair(Plain(gate, gate_bias), Plain(up, up_bias), activation), made)

    def _best(self, exact: P, made: Callable[[Tensor | None], P]) -> P:
        """What loses least of the exact results, in the mean over rows."""
        expected = exact(self.rows).float()
        size = expected.norm(dim=1).clamp_min(1e-30)

        def error(product: P) -> float:
            return float(((product(self.rows).float() - expected).norm(dim=1) / size).mean())

        best = made(None)
        least = error(best) * _WORTHWHILE
        for factors in self.factors:
            product = made(factors)
            if (lost := error(product)) < least:
                best, least, self.better = product, lost, True
        self._done = True
        return best
