"""A mixture of experts: each token goes through the few MLPs that a router chooses (Shazeer et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.formats.dense import Linear
from penstock.models.config import ExpertsConfig
from penstock.models.mlp import Mlp


@dataclass(frozen=True)
class Experts:
    """router: to a score for each expert. correction: [experts] added to the scores for the choice alone, or None.

    shared: an MLP for every token, or None; shared_gate: to one number, or None.
    """

    config: ExpertsConfig
    router: Linear
    correction: Tensor | None
    experts: list[Mlp]
    shared: Mlp | None
    shared_gate: Linear | None

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        chosen, weights = route(self.router(x), self.config, self.correction)
        out = torch.zeros_like(x) if residual is None else residual.clone()
        for expert in chosen.unique().tolist():
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            weight = weights[rows, places].unsqueeze(1).to(x.dtype)
            if self.config.weighs_input:
                out.index_add_(0, rows, self.expert(expert, rows)(x[rows] * weight))
            else:
                out.index_add_(0, rows, self.expert(expert, rows)(x[rows]) * weight)
        if self.shared is None:
            return out
        if self.shared_gate is None:
            return self.shared(x, out)
        return out.add_(self.shared(x) * torch.sigmoid(self.shared_gate(x)))

    def expert(self, number: int, rows: Tensor) -> Mlp:
        """One of the experts, as some rows of a batch meet it."""
        return self.experts[number]


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
