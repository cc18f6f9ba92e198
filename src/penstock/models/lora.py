"""LoRA adapters (Hu et al. 2021): a low-rank term beside the matrices of a layer, another for each row of a batch.

A step's rows are sorted by adapter once. A product that some of them change is computed for all rows as ever, and then
each adapter adds its term to its own rows: two small products. Rows without an adapter are never touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.formats.dense import Gated, Linear
from penstock.kernels.norms import ACTIVATIONS


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to one product. a: [rank, in]; b: [out, rank], scaled."""

    a: Tensor
    b: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x: [n, in] -> [n, out]"""
        return F.linear(F.linear(x, self.a), self.b)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter in memory. layers: for each layer its terms, by slot (see `adapter_targets`)."""

    layers: list[dict[str, LowRank]]

    def to(self, device: torch.device) -> Adapter:
        """The same on a device."""
        return Adapter(
            [{k: LowRank(t.a.to(device), t.b.to(device)) for k, t in layer.items()} for layer in self.layers]
        )

    @cached_property
    def routes(self) -> bool:
        """Whether it has terms for single experts of a mixture: which rows these are for only the router knows."""
        return any(slot.startswith("experts.") for layer in self.layers for slot in layer)

    @cached_property
    def nbytes(self) -> int:
        return sum(term.a.nbytes + term.b.nbytes for layer in self.layers for term in layer.values())


@dataclass(frozen=True)
class RowAdapters:
    """Which adapter each row of a batch goes through.

    owners: [T] int64, the place of its adapter in `adapters`, -1 for a row without one; None where all rows go through
    the one adapter, so that nothing about them need be asked.
    """

    adapters: tuple[Adapter, ...]
    owners: Tensor | None

    def of(self, rows: Tensor) -> RowAdapters:
        """The same for some of the rows. rows: [n] int64"""
        return self if self.owners is None else RowAdapters(self.adapters, self.owners[rows])

    def terms(self, layer: int, slot: str) -> Terms:
        """What is added in one place: each term with the rows that it is for."""
        return [(a.layers[layer][slot], rows) for a, rows in self._groups if slot in a.layers[layer]]

    def touch(self, layer: int, prefix: str) -> bool:
        """Whether any adapter has a term in a slot of that beginning."""
        return any(slot.startswith(prefix) for adapter in self.adapters for slot in adapter.layers[layer])

    @cached_property
    def _groups(self) -> list[tuple[Adapter, Tensor | None]]:
        if self.owners is None:
            return [(adapter, None) for adapter in self.adapters]
        found = [(a, (self.owners == i).nonzero().view(-1)) for i, a in enumerate(self.adapters)]
        return [(adapter, rows) for adapter, rows in found if len(rows)]


Terms = list[tuple[LowRank, Tensor | None]]  # with the rows that each is for, [n] int64, None for all


@dataclass(frozen=True)
class AdaptedLinear:
    """A projection and what adapters add to some of its rows."""

    base: Linear
    terms: Terms

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.base(x, residual)
        for term, rows in self.terms:
            if rows is None or len(rows) == len(x):
                y += term(x)
            else:
                y.index_add_(0, rows, term(x[rows]))
        return y


@dataclass(frozen=True)
class AdaptedGated:
    """The first half of a gated MLP with terms [2 * out, rank], the gate's rows first.

    They come before the activation, which the base computes in one go with its products; so the rows with a term take
    the two products apart, and the others the usual way.
    """

    base: Gated
    terms: Terms

    @property
    def activation(self) -> str:
        return self.base.activation

    def __call__(self, x: Tensor) -> Tensor:
        given = [rows for _, rows in self.terms if rows is not None]
        if len(given) < len(self.terms) or sum(map(len, given)) == len(x):
            return self._opened(x)
        touched = torch.cat(given)
        others = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill_(0, touched, False).nonzero().view(-1)
        places = torch.arange(len(touched), device=x.device).split([len(rows) for rows in given])
        among: Terms = [(term, rows) for (term, _), rows in zip(self.terms, places, strict=True)]
        y = x.new_empty(len(x), self.terms[0][0].b.shape[0] // 2)
        y[others] = self.base(x[others])
        y[touched] = AdaptedGated(self.base, among)._opened(x[touched])
        return y

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = self.base.halves(x)
        for term, rows in self.terms:
            to_gate, to_up = term(x if rows is None else x[rows]).chunk(2, dim=1)
            for half, added in ((gate, to_gate), (up, to_up)):
                if rows is None:
                    half += added
                else:
                    half.index_add_(0, rows, added)
        return gate, up

    def _opened(self, x: Tensor) -> Tensor:
        gate, up = self.halves(x)
        return ACTIVATIONS[self.activation](gate).mul_(up)
