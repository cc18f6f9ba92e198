"""A decoder's layer as the rows of one step meet it: its projections with what their adapters add."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from torch import Tensor

from penstock.formats.dense import Gated, Linear
from penstock.models.attention import FusedQkv, LatentQkv, Qkv
from penstock.models.experts import Experts
from penstock.models.inputs import Wanted
from penstock.models.lora import AdaptedGated, AdaptedLinear, RowAdapters
from penstock.models.mlp import GatedMlp, Mlp, PlainMlp
from penstock.models.weights import LayerWeights


def adapted(layer: LayerWeights, number: int, rows: RowAdapters, wanted: Wanted | None) -> LayerWeights:
    """The layer with the adapters of a step's rows. wanted: the rows that go on behind attention, None for all.

    The slots named here are those of `adapter_targets`.
    """
    before = _Wrap(number, rows)
    behind = before if wanted is None else _Wrap(number, rows.of(wanted.rows))
    return replace(
        layer,
        attention=replace(layer.attention, qkv=_qkv(layer.attention.qkv, before)),
        out=behind.linear("out", layer.out),
        mlp=_mlp(layer.mlp, behind),
    )


@dataclass(frozen=True)
class _Wrap:
    """Puts the terms of one layer beside its projections. prefix: of the slots."""

    layer: int
    rows: RowAdapters
    prefix: str = ""

    def linear(self, slot: str, base: Linear) -> Linear:
        terms = self.rows.terms(self.layer, self.prefix + slot)
        return AdaptedLinear(base, terms) if terms else base

    def gated(self, base: Gated) -> Gated:
        terms = self.rows.terms(self.layer, f"{self.prefix}gate_up")
        return AdaptedGated(base, terms) if terms else base


def _qkv(qkv: Qkv, wrap: _Wrap) -> Qkv:
    if isinstance(qkv, FusedQkv):
        return replace(qkv, product=wrap.linear("qkv", qkv.product))
    if isinstance(qkv, LatentQkv):
        slots = ("q",) if len(qkv.query) == 1 else ("q_a", None, "q_b")  # None: a norm
        query = tuple(
            part if slot is None else wrap.linear(slot, cast(Linear, part))
            for slot, part in zip(slots, qkv.query, strict=True)
        )
        return replace(qkv, query=query, down=wrap.linear("kv_a", qkv.down), up=wrap.linear("kv_b", qkv.up))
    return qkv


def _mlp(mlp: Mlp, wrap: _Wrap) -> Mlp:
    if isinstance(mlp, GatedMlp):
        return GatedMlp(wrap.gated(mlp.gate_up), wrap.linear("down", mlp.down))
    if isinstance(mlp, PlainMlp):
        return replace(mlp, up=wrap.linear("up", mlp.up), down=wrap.linear("down", mlp.down))
    if isinstance(mlp, Experts):
        touched = wrap.rows.touch(wrap.layer, "experts.")
        kind = partial(AdaptedExperts, wrap=wrap) if touched else Experts
        return kind(
            config=mlp.config,
            router=wrap.linear("router", mlp.router),
            correction=mlp.correction,
            experts=mlp.experts,
            stacked=None if touched else mlp.stacked,  # which rows an expert gets is then asked for
            shared=None if mlp.shared is None else _mlp(mlp.shared, replace(wrap, prefix="shared.")),
            shared_gate=None if mlp.shared_gate is None else wrap.linear("shared_gate", mlp.shared_gate),
        )
    return mlp


@dataclass(frozen=True)
class AdaptedExperts(Experts):
    """A mixture of experts, each with the adapters of the rows that the router sends it."""

    wrap: _Wrap

    def expert(self, number: int, rows: Tensor) -> Mlp:
        """One of the experts, as some rows of a batch meet it."""
        wrap = replace(self.wrap, rows=self.wrap.rows.of(rows), prefix=f"experts.{number}.")
        return _mlp(self.experts[number], wrap)
