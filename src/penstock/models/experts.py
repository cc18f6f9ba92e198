"""A mixture of experts: each token goes through the few MLPs that a router chooses (Shazeer et al. 2017).

Which experts a step needs only the router knows. Where that is in a GPU's memory, asking would stop the step; steps of
not too many rows therefore multiply there by launches that are the same whatever it says.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penstock.formats.dense import GatedPanels, Linear, Panels
from penstock.kernels.products import Packed
from penstock.models.config import ExpertsConfig
from penstock.models.mlp import GatedMlp, Mlp

if TYPE_CHECKING:
    from penstock.kernels.triton.experts import StackedMatrices


@dataclass(frozen=True)
class StackedExperts:
    """The matrices of all experts of a layer, for launches that do not depend on the router."""

    gate_up: StackedMatrices
    down: StackedMatrices

    def takes(self, rows: int) -> bool:
        from penstock.kernels.triton.experts import ROWS

        return rows <= ROWS

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor, weighs_input: bool, residual: Tensor) -> Tensor:
        """residual + what the experts make of each row. x, residual: [T, hidden]; chosen, weights: [T, top_k]."""
        from penstock.kernels.triton.experts import expert_products

        weights = weights.to(x.dtype)
        if weighs_input:
            x = (x.unsqueeze(1) * weights.unsqueeze(2)).flatten(0, 1)
            weights = torch.ones_like(weights)
        y = expert_products(self.down, expert_products(self.gate_up, x, chosen), chosen)
        y = y.view(*chosen.shape, -1)
        return torch.baddbmm(residual.unsqueeze(1), weights.unsqueeze(1), y).squeeze(1)


@dataclass(frozen=True)
class Experts:
    """router: to a score for each expert. correction: [experts] added to the scores for the choice alone, or None.

    stacked: the experts again, on a GPU and where they are alike, else None. shared: an MLP for every token, or None;
    shared_gate: to one number, or None.
    """

    config: ExpertsConfig
    router: Linear
    correction: Tensor | None
    experts: list[Mlp]
    stacked: StackedExperts | None
    shared: Mlp | None
    shared_gate: Linear | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        chosen, weights = route(self.router(x), self.config, self.correction)
        if self.stacked is not None and self.stacked.takes(len(x)):
            before = torch.zeros_like(x) if residual is None else residual
            return self._shared(x, self.stacked(x, chosen, weights, self.config.weighs_input, before))
        out = torch.zeros_like(x) if residual is None else residual.clone()
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            weight = weights[rows, places].unsqueeze(1).to(x.dtype)
            if self.config.weighs_input:
                out.index_add_(0, rows, self.expert(expert, rows)(x[rows] * weight))
            else:
                out.index_add_(0, rows, self.expert(expert, rows)(x[rows]) * weight)
        return self._shared(x, out)

    def _shared(self, x: Tensor, out: Tensor) -> Tensor:
        """`out`, and what every token gets besides."""
        if self.shared is None:
            return out
        if self.shared_gate is None:
            return self.shared(x, out)
        return out.add_(self.shared(x) * torch.sigmoid(self.shared_gate(x)))

    def expert(self, number: int, rows: Tensor) -> Mlp:
        """One of the experts, as some rows of a batch meet it."""
        return self.experts[number]


def stack(experts: list[Mlp]) -> tuple[StackedExperts | None, list[Mlp]]:
    """Put experts that lie on a GPU behind each other. Returns None for others, and the experts as they then are."""
    gates, downs = [], []
    for mlp in experts:
        if not (isinstance(mlp, GatedMlp) and isinstance(mlp.gate_up, GatedPanels) and isinstance(mlp.down, Panels)):
            return None, experts
        if isinstance(mlp.gate_up.packed, Packed) or isinstance(mlp.down.packed, Packed):
            return None, experts
        gates.append(mlp.gate_up.packed)
        downs.append(mlp.down.packed)
    from penstock.kernels.triton import experts as triton

    gate_up, down = triton.stack(gates), triton.stack(downs)
    if gate_up is None or down is None:
        return None, experts
    parts: list[Mlp] = [
        GatedMlp(replace(mlp.gate_up, packed=first), replace(mlp.down, packed=second))
        for mlp, first, second in zip(experts, gate_up[1], down[1], strict=True)
        if isinstance(mlp, GatedMlp) and isinstance(mlp.gate_up, GatedPanels) and isinstance(mlp.down, Panels)
    ]
    return StackedExperts(gate_up[0], down[0]), parts


def route(scores: Tensor, config: ExpertsConfig, correction: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The experts of each token and their weights. scores: [T, experts] of the router -> two [T, top_k]."""
    scores = scores.float()
    scores = scores.softmax(dim=-1) if config.scoring == "softmax" else scores.sigmoid()
    if correction is None:
        wanted = scores = _best_groups(scores, config, 0.0)
    else:
        wanted = _best_groups(scores + correction, config, -torch.inf, of_two=True)
    chosen = wanted.topk(config.top_k, dim=-1).indices
    weights = scores.gather(1, chosen)
    if config.normalized:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return chosen, weights * config.scale


def _best_groups(scores: Tensor, config: ExpertsConfig, outside: float, of_two: bool = False) -> Tensor:
    """Scores of experts outside the best groups become `outside`. of_two: a group is as good as its two best experts,
    else as its best."""
    if config.groups == 1:
        return scores
    by_group = scores.view(len(scores), config.groups, -1)
    worth = by_group.topk(2, dim=-1).values.sum(dim=-1) if of_two else by_group.amax(dim=-1)
    best = worth.topk(config.top_groups, dim=-1).indices
    keep = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, best, True)
    return by_group.masked_fill(~keep.unsqueeze(-1), outside).flatten(1)
