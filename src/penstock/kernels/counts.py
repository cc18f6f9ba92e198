"""How often each token came, counted where the scores lie, and the penalties that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PenaltyRules:
    """Penalties of each of n rows: tensors [n], on the scores' device.

    slot: int32, the row of the counts, -1 for a row without penalties; repetition, frequency (relative to the length),
    count, presence: float32, as `Sampling` names them; length: int32, tokens of prompt and output so far.
    """

    slot: Tensor
    repetition: Tensor
    frequency: Tensor
    count: Tensor
    presence: Tensor
    length: Tensor


def penalize_counted(scores: Tensor, rules: PenaltyRules, counts: Tensor) -> None:
    """Repetition, frequency and presence penalties, in place. scores: [n, vocab] float32; counts: [slots, 2, vocab]
    int32, how often each token came in prompt and output, and in the output alone."""
    if scores.is_cuda:
        from penstock.kernels.triton import penalties

        penalties.penalize(scores, rules, counts)
        return
    rows = (rules.slot >= 0).nonzero().view(-1)
    every, made = counts[rules.slot[rows].long()].float().unbind(1)
    repetition, frequency, count, presence = (
        column[rows].unsqueeze(1) for column in (rules.repetition, rules.frequency, rules.count, rules.presence)
    )
    x = scores[rows]
    x = torch.where(every > 0, torch.where(x < 0, x * repetition, x / repetition), x)
    x -= frequency * every / rules.length[rows].unsqueeze(1)
    scores[rows] = x - torch.where(made > 0, count * made + presence, 0.0)


def count_text(counts: Tensor, slot: int, ids: Tensor, prompt_length: int) -> None:
    """Begin a slot with a sequence's ids [length], the first of them its prompt's. counts: see `penalize_counted`."""
    counts[slot].zero_()
    for row, part in zip(counts[slot], (ids, ids[prompt_length:]), strict=True):
        row.scatter_add_(0, part, torch.ones_like(part, dtype=counts.dtype))


def count_tokens(counts: Tensor, slot: Tensor, ids: Tensor) -> None:
    """Count the token that each row got. counts: see `penalize_counted`; slot: [n] int32, no two alike but -1; ids:
    [n]."""
    if counts.is_cuda:
        from penstock.kernels.triton import penalties

        penalties.count_tokens(counts, slot, ids)
        return
    kept = slot >= 0
    counts[slot[kept].long(), :, ids[kept]] += 1
