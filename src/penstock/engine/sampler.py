"""From scores to the next token of each row.

The processors run in TGI's order: watermark, repetition penalty, frequency penalty, grammar, temperature, top-k, top-p,
typical-p. What TGI has not is put where its users know it from: the bias of single tokens is part of the raw scores,
OpenAI's penalties stand beside TGI's, the minimum length beside the grammar, min-p is last. A draw inverts the
cumulative distribution at a number that depends on (seed, position) alone, so the same request makes the same draws in
any batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.engine.request import Sampling, Token
from penstock.engine.sequence import Sequence
from penstock.kernels.sampling import largest, restrict

_TIES = 64  # further alternatives that tie with the last; a flat distribution ties everywhere
_COLDEST = 1e-6  # temperatures below are greedy in float32 anyway
_HUGE = 1e30  # factors beyond have no more effect, but would overflow float32
_WATERMARK_PRIME = 15485863
_EXCLUDED = float("-inf")


@dataclass(frozen=True)
class Watermark:
    """Green-list watermark: `delta` is added to a share `gamma` of the vocabulary. (Kirchenbauer et al. 2023)"""

    gamma: float = 0.5
    delta: float = 2.0


class BrokenScores(ValueError):
    """The model's scores of a row are not numbers."""


def choose(logits: Tensor, sequences: list[Sequence], watermark: Watermark) -> list[Token | BrokenScores]:
    """The next token of each row, with log-probabilities and alternatives where its request asks for them.

    logits: [n, vocab] of any float type, row i for sequences[i]; used up. Log-probabilities are of the processed
    scores. A row whose scores are NaN gives the error in place of a token; the others are not touched by it.
    """
    requests = [s.request for s in sequences]
    results: list[Token | BrokenScores | None] = [None] * len(requests)
    # rows that take the plain maximum and tell nothing more never leave the type the model computed in
    bare = [i for i, r in enumerate(requests) if r.sampling.plain and not r.logprobs and not r.top_n_tokens]
    taken = set(bare)
    rest = [i for i in range(len(requests)) if i not in taken]
    if bare:
        scores = logits if not rest else logits[bare]
        _restrict(scores, [sequences[i] for i in bare])
        best, ids = largest(scores)
        for i, value, token_id in zip(bare, best.float().tolist(), ids.tolist(), strict=True):
            results[i] = Token(token_id) if value > _EXCLUDED else BrokenScores()
    if rest:
        scores = (logits if not bare else logits[rest]).float()
        process(scores, [sequences[i] for i in rest], watermark)
        ids = _pick(scores, [sequences[i] for i in rest])
        logprobs = scores - torch.logsumexp(scores, dim=-1, keepdim=True)
        chosen = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
        for row, (i, token_id, logprob) in enumerate(zip(rest, ids.tolist(), chosen, strict=True)):
            if logprob != logprob:
                results[i] = BrokenScores()
                continue
            top = _top(logprobs[row], requests[i].top_n_tokens)
            results[i] = Token(token_id, logprob if requests[i].logprobs else None, top)
    return [result for result in results if result is not None]


def process(scores: Tensor, sequences: list[Sequence], watermark: Watermark) -> None:
    """Apply every processor that a row asks for, in order and in place. scores: [n, vocab] float32, -inf = excluded."""
    busy = [(row, s) for row, s in enumerate(sequences) if not s.request.sampling.plain]
    for row, sequence in busy:
        _penalize(scores[row], sequence, watermark)
    _restrict(scores, sequences)
    for row, sequence in busy:
        _sharpen(scores[row], sequence.request.sampling)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one draw, a pure function of its arguments."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def prompt_logprobs(
    logits: Tensor, targets: Tensor, top_n: int = 0
) -> tuple[list[float], list[list[tuple[int, float]]]]:
    """Log-probability of each next prompt token, and the top_n likeliest in its place (none of them when 0).

    logits: [n, vocab]; targets: [n] -> n of both. A target that is among the likeliest has the very same number there.
    """
    scores = logits.float()
    logprobs = scores - torch.logsumexp(scores, dim=-1, keepdim=True)
    chosen: list[float] = logprobs.gather(1, targets.unsqueeze(1)).squeeze(1).tolist()
    return chosen, [_top(row, top_n) for row in logprobs] if top_n else []


def _restrict(scores: Tensor, sequences: list[Sequence]) -> None:
    """Exclude, in place, what a grammar does not allow, and what would end a sequence too early, unless its grammar
    leaves nothing else. scores: [n, vocab]."""
    masks = [None if s.cursor is None else s.cursor.bits for s in sequences]
    withheld = [s.withheld for s in sequences]
    if any(withheld) or any(mask is not None for mask in masks):
        restrict(scores, masks, withheld)


def _pick(scores: Tensor, sequences: list[Sequence]) -> Tensor:
    """The token of each row: the likeliest, or a draw. scores: [n, vocab] -> [n]."""
    ids = scores.argmax(dim=-1)
    for i, sequence in enumerate(sequences):
        if sequence.request.sampling.draws:
            ids[i] = _draw(scores[i], uniform(sequence.request.sampling.seed, len(sequence.ids)))
    return ids


def _draw(row: Tensor, at: float) -> int:
    """The token at which the cumulative distribution, in the order of the ids, passes `at`. row: [vocab]."""
    cumulative = np.cumsum(torch.softmax(row, dim=0).numpy(), dtype=np.float64)
    total = cumulative[-1]
    below = min(at * total, np.nextafter(total, 0))  # rounding must not lead past the last token that can be drawn
    return min(int(np.searchsorted(cumulative, below, side="right")), len(row) - 1)


def _penalize(row: Tensor, sequence: Sequence, watermark: Watermark) -> None:
    """Bias, watermark and penalties, in place. row: [vocab]."""
    sampling, ids = sequence.request.sampling, sequence.ids
    if sampling.logit_bias:
        row[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()))
    if sampling.watermark:
        generator = torch.Generator().manual_seed(_WATERMARK_PRIME * ids[-1])
        green = torch.randperm(len(row), generator=generator)[: int(watermark.gamma * len(row))]
        row[green] += watermark.delta
    if not sampling.penalizes:
        return
    if sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0:
        seen, counts = torch.tensor(ids).unique(return_counts=True)
        if sampling.repetition_penalty != 1.0:  # Keskar et al. 2019
            values, penalty = row[seen], min(max(sampling.repetition_penalty, 1 / _HUGE), _HUGE)
            row[seen] = torch.where(values < 0, values * penalty, values / penalty)
        if sampling.frequency_penalty != 0.0:  # TGI's formula: relative to the length of the text
            row[seen] -= sampling.frequency_penalty * counts / len(ids)
    generated = ids[sequence.prompt_length :]
    if generated and (sampling.count_penalty != 0.0 or sampling.presence_penalty != 0.0):  # OpenAI's formula
        seen, counts = torch.tensor(generated).unique(return_counts=True)
        row[seen] -= sampling.count_penalty * counts + sampling.presence_penalty


def _sharpen(row: Tensor, sampling: Sampling) -> None:
    """Temperature, and the rules that keep only the likelier tokens, in place. row: [vocab]."""
    if sampling.temperature != 1.0:
        # from the maximum down, so that a tiny temperature leaves a greedy row and not infinities
        row -= row.max()
        row /= min(max(sampling.temperature, _COLDEST), _HUGE)
    if sampling.top_k > 0:
        _keep_top_k(row, sampling.top_k)
    if sampling.top_p < 1.0:
        _keep_top_p(row, sampling.top_p)
    if sampling.typical_p < 1.0:
        _keep_typical(row, sampling.typical_p)
    if sampling.min_p > 0.0:  # Nguyen et al. 2024: relative to the likeliest token
        probabilities = torch.softmax(row, dim=0)
        row[probabilities < sampling.min_p * probabilities.max()] = _EXCLUDED


def _keep_top_k(row: Tensor, k: int) -> None:
    """Exclude everything below the k-th largest; ties with it stay."""
    if k < len(row):
        row[row < row.topk(k).values[-1]] = _EXCLUDED


def _keep_top_p(row: Tensor, p: float) -> None:
    """Keep the likeliest tokens until their mass reaches p; at least one. (Holtzman et al. 2020)

    Tokens that tie with the last one kept stay.
    """
    probabilities = torch.softmax(row, dim=0).numpy()
    ordered = np.sort(probabilities)[::-1]  # NumPy's vector sort: many times faster than torch's on a processor
    mass = np.cumsum(ordered, dtype=np.float64)
    last = min(int(np.searchsorted(mass, p)), len(ordered) - 1)  # the token that crosses p is kept
    row[torch.from_numpy(probabilities < ordered[last])] = _EXCLUDED


def _keep_typical(row: Tensor, p: float) -> None:
    """Keep the tokens whose surprise is nearest to the entropy until their mass reaches p. (Meister et al. 2023)"""
    logprobs = torch.log_softmax(row, dim=0)
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs.masked_fill(probabilities == 0, 0.0)).sum()
    order = np.argsort((-logprobs - entropy).abs().numpy())
    mass = np.cumsum(probabilities.numpy()[order], dtype=np.float64)
    row[torch.from_numpy(order[int(np.searchsorted(mass, p)) + 1 :])] = _EXCLUDED


def _top(logprobs: Tensor, n: int) -> list[tuple[int, float]]:
    """The n likeliest tokens of a row, best first; ties with the last of them are all given. logprobs: [vocab]."""
    n = min(n, len(logprobs))
    if n == 0:
        return []
    values, ids = logprobs.topk(n)
    best = list(zip(ids.tolist(), values.tolist(), strict=True))
    ties = (logprobs == values[-1]).nonzero().squeeze(1).tolist() if values[-1].isfinite() else []
    taken = set(ids.tolist())
    best += [(i, best[-1][1]) for i in ties if i not in taken][:_TIES]
    return [(i, logprob) for i, logprob in best if logprob > _EXCLUDED]
