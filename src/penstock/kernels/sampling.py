"""Choosing among scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.kernels import native
from penstock.kernels.mask import Mask
from penstock.kernels.penalty import Penalty

_EXCLUDED = float("-inf")


def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The largest score of each row and its place; NaN where a row has one. scores: [n, vocab] -> two [n]."""
    if not scores.is_cuda and native.can_find_largest(scores):
        return native.largest(scores)
    best, ids = scores.max(dim=-1)
    return best, ids


def restrict(scores: Tensor, masks: Sequence[Mask | None], withheld: Sequence[Sequence[int]]) -> None:
    """Make -inf, in place, what must not come next in each row.

    scores: [n, vocab]; masks: n of them, None where all may come; withheld: n lists of different ids that may not come
    either, unless a mask leaves a row nothing else.
    """
    if scores.is_cuda:
        _restrict_on_device(scores, masks, withheld)
    elif native.can_restrict(scores):
        native.restrict(scores, masks, withheld)
    else:
        restrict_plainly(scores, masks, withheld)


def restrict_plainly(scores: Tensor, masks: Sequence[Mask | None], withheld: Sequence[Sequence[int]]) -> None:
    """The twin of the compiled kernel."""
    for row, mask, ids in zip(scores, masks, withheld, strict=True):
        if mask is not None:
            allowed = np.unpackbits(mask.bits.view(np.uint8), count=len(row), bitorder="little")
            row.masked_fill_(torch.from_numpy(allowed == 0), _EXCLUDED)
        if ids:
            kept = row[list(ids)]
            row[list(ids)] = _EXCLUDED
            if (row == _EXCLUDED).all():
                row[list(ids)] = kept


def penalize(scores: Tensor, penalties: Sequence[Penalty | None]) -> None:
    """Lower, in place, what was there before. scores: [n, vocab] float32; penalties: n of them, None for none."""
    if native.can_penalize(scores):
        native.penalize(scores, penalties)
    else:
        penalize_plainly(scores, penalties)


def penalize_plainly(scores: Tensor, penalties: Sequence[Penalty | None]) -> None:
    """The twin of the compiled kernel."""
    for row, penalty in zip(scores, penalties, strict=True):
        if penalty is None:
            continue
        tally, n = penalty.tally, penalty.tally.count
        ids, often, made = (torch.from_numpy(x[:n]).to(row.device) for x in (tally.ids, tally.often, tally.made))
        values = row[ids]
        if penalty.repetition != 1.0:
            values = torch.where(values < 0, values * penalty.repetition, values / penalty.repetition)
        values -= penalty.frequency * often / tally.length
        row[ids] = values - torch.where(made > 0, penalty.each * made + penalty.once, 0.0)


class DrawRule(NamedTuple):
    """How a token is drawn, in TGI's order. temperature: above 0; top_p: 1 for all; min_p, top_k: 0 for all; at: in [0,
    1), where the cumulative distribution, in the order of the ids, is inverted."""

    temperature: float
    top_p: float
    min_p: float
    top_k: int
    at: float


def draw(scores: Tensor, rules: Sequence[DrawRule]) -> tuple[Tensor, Tensor]:
    """A token of each row, and its log-probability among what its rule keeps; NaN where the scores allow none.

    scores: [n, vocab] float32, -inf for what may not come; may be changed -> [n] int64, [n] float32
    """
    if scores.is_cuda:
        return _draw_on_device(scores, rules)
    return native.draw(scores, rules) if native.can_draw(scores) else draw_plainly(scores, rules)


def _draw_on_device(scores: Tensor, rules: Sequence[DrawRule]) -> tuple[Tensor, Tensor]:
    from penstock.kernels.triton import sampler

    table = _sent(torch.tensor([tuple(rule) for rule in rules], dtype=torch.float64), scores.device)
    temperature, top_p, min_p, top_k, at = table.unbind(1)
    given = sampler.SamplerRules(
        temperature=temperature.float(),
        top_k=top_k.int(),
        top_p=top_p.float(),
        typical_p=torch.ones_like(top_p, dtype=torch.float32),
        min_p=min_p.float(),
        at=at.contiguous(),
    )
    return sampler.draw(scores, given)


def _restrict_on_device(scores: Tensor, masks: Sequence[Mask | None], withheld: Sequence[Sequence[int]]) -> None:
    from penstock.kernels.triton import penalties

    vocab = scores.shape[1]
    bits = [allowed_bits(mask, ids, vocab) for mask, ids in zip(masks, withheld, strict=True)]
    told = [i for i, mask in enumerate(bits) if mask is not None]
    if told:
        places = torch.full((len(bits),), -1, dtype=torch.int32)
        places[told] = torch.arange(len(told), dtype=torch.int32)
        given = torch.from_numpy(np.stack([mask.view(np.int32) for mask in bits if mask is not None]))
        penalties.restrict_bits(scores, _sent(given, scores.device), _sent(places, scores.device))


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on a device. From pinned memory nobody waits for the device to come to it."""
    if device.type == "cpu":
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)


def allowed_bits(mask: Mask | None, withheld: Sequence[int], vocab: int) -> NDArray[np.uint32] | None:
    """What `restrict` takes of a row as one mask, [ceil(vocab / 32)]; None where everything may come."""
    words = -(-vocab // 32)
    given = None if mask is None else mask.bits[:words]
    if not withheld:
        return given
    bits = np.full(words, 0xFFFFFFFF, dtype=np.uint32) if given is None else given.copy()
    ids = np.asarray(withheld)
    np.bitwise_and.at(bits, ids // 32, ~(np.uint32(1) << (ids % 32).astype(np.uint32)))
    used = np.unpackbits(bits.view(np.uint8), count=vocab, bitorder="little")
    return bits if used.any() else given


def draw_plainly(scores: Tensor, rules: Sequence[DrawRule]) -> tuple[Tensor, Tensor]:
    """The twin of the compiled kernel."""
    ids, logprobs = scores.new_zeros(len(scores), dtype=torch.int64), scores.new_empty(len(scores))
    for i, (row, rule) in enumerate(zip(scores, rules, strict=True)):
        cool(row, rule.temperature)
        if rule.top_k:
            keep_top_k(row, rule.top_k)
        if rule.top_p < 1:
            keep_top_p(row, rule.top_p)
        if rule.min_p > 0:
            keep_min_p(row, rule.min_p)
        ids[i] = inverted(row, rule.at)
        logprobs[i] = row.log_softmax(0)[ids[i]]
    return ids, logprobs


def cool(row: Tensor, temperature: float) -> None:
    """Divide by the temperature, in place, from the maximum down, so that a tiny one leaves a greedy row and not
    infinities. row: [vocab]"""
    row -= row.max()
    row /= temperature


def keep_top_k(row: Tensor, k: int) -> None:
    """Exclude everything below the k-th largest, in place; ties with it stay. row: [vocab]"""
    if k < len(row):
        row[row < row.topk(k).values[-1]] = _EXCLUDED


def keep_top_p(row: Tensor, p: float) -> None:
    """Keep the likeliest tokens until their mass reaches p, in place; at least one, and whatever ties with the last.
    (Holtzman et al. 2020) row: [vocab]"""
    probabilities = torch.softmax(row, dim=0).numpy()
    ordered = np.sort(probabilities)[::-1]  # NumPy's vector sort: many times faster than torch's on a processor
    mass = np.cumsum(ordered, dtype=np.float64)
    last = min(int(np.searchsorted(mass, p)), len(ordered) - 1)  # the token that crosses p is kept
    row[torch.from_numpy(probabilities < ordered[last])] = _EXCLUDED


def keep_min_p(row: Tensor, p: float) -> None:
    """Exclude what is less likely than p times the likeliest, in place. (Nguyen et al. 2024) row: [vocab]"""
    probabilities = torch.softmax(row, dim=0)
    row[probabilities < p * probabilities.max()] = _EXCLUDED


def inverted(row: Tensor, at: float) -> int:
    """The token at which the cumulative distribution, in the order of the ids, passes `at`. row: [vocab]"""
    cumulative = np.cumsum(torch.softmax(row, dim=0).numpy(), dtype=np.float64)
    total = cumulative[-1]
    below = min(at * total, np.nextafter(total, 0))  # rounding must not lead past the last token that can be drawn
    return min(int(np.searchsorted(cumulative, below, side="right")), len(row) - 1)
