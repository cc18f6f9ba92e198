"""What changes scores before the temperature: repeated tokens, and what a grammar forbids. All in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.counts import PenaltyRules

_BLOCK = 1024


@triton.jit
def _penalize(
    scores, counts, slot, repetition, frequency, count, presence, length, vocab, stride, BLOCK: tl.constexpr
):  # fmt: skip
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(slot + row).to(tl.int64)
    if place < 0:
        return
    mask = column < vocab
    every = tl.load(counts + (place * 2) * vocab + column, mask=mask, other=0)
    generated = tl.load(counts + (place * 2 + 1) * vocab + column, mask=mask, other=0)
    target = scores + row * stride + column
    x = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(repetition + row)
    x = tl.where(every > 0, tl.where(x < 0, x * factor, x / factor), x)
    x -= tl.load(frequency + row) * every.to(tl.float32) / tl.load(length + row).to(tl.float32)
    once = tl.where(generated > 0, tl.load(presence + row), 0.0)
    x -= tl.load(count + row) * generated.to(tl.float32) + once
    tl.store(target, x.to(scores.dtype.element_ty), mask=mask)


def penalize(scores: Tensor, rules: PenaltyRules, counts: Tensor) -> None:
    """See `penstock.kernels.counts.penalize_counted`. scores: [n, vocab] of any float type."""
    n, vocab = scores.shape
    given = (rules.slot, rules.repetition, rules.frequency, rules.count, rules.presence, rules.length)
    _penalize[(n, -(-vocab // _BLOCK))](scores, counts, *given, vocab, scores.stride(0), BLOCK=_BLOCK)


@triton.jit
def _count(counts, slot, ids, vocab):
    row = tl.program_id(0)
    place = tl.load(slot + row).to(tl.int64)
    if place < 0:
        return
    target = counts + place * 2 * vocab + tl.load(ids + row).to(tl.int64)
    tl.store(target, tl.load(target) + 1)
    tl.store(target + vocab, tl.load(target + vocab) + 1)


def count_tokens(counts: Tensor, slot: Tensor, ids: Tensor) -> None:
    """See `penstock.kernels.counts.count_tokens`."""
    _count[(len(ids),)](counts, slot, ids, counts.shape[2])


@triton.jit
def _restrict(scores, masks, mask_of, vocab, stride, words, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    which = tl.load(mask_of + row).to(tl.int64)
    if which < 0:
        return
    word = tl.load(masks + which * words + column // 32, mask=column < vocab, other=-1)
    forbidden = ((word >> (column % 32)) & 1) == 0
    tl.store(scores + row * stride + column, float("-inf"), mask=forbidden & (column < vocab))


def restrict_bits(scores: Tensor, masks: Tensor, mask_of: Tensor) -> None:
    """Make -inf, in place, what must not come next. scores: [n, vocab]; masks: [m, ceil(vocab / 32)] int32, a bit a
    token, lowest first, set where it may come; mask_of: [n] int32, the mask of each row, -1 for none."""
    n, vocab = scores.shape
    grid = (n, -(-vocab // _BLOCK))
    _restrict[grid](scores, masks, mask_of, vocab, scores.stride(0), masks.shape[1], BLOCK=_BLOCK)


@triton.jit
def _chosen_logprobs(out, logits, targets, vocab, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    top, total = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.float32)
    for base in range(0, vocab, BLOCK):
        column = base + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(x - safe)
        top = higher
    best = tl.max(top, 0)
    whole = tl.sum(total * tl.exp(top - best), 0)
    x = tl.load(logits + row * stride + tl.load(targets + row)).to(tl.float32)
    tl.store(out + row, x - best - tl.log(whole))


def chosen_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of a token of each row. logits: [n, vocab]; targets: [n] int64 -> [n] float32"""
    out = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    _chosen_logprobs[(len(logits),)](out, logits, targets, logits.shape[1], logits.stride(0), BLOCK=4096, num_warps=8)
    return out
