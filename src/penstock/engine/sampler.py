"""From scores to the next token of each row.

The processors run in TGI's order: watermark, repetition penalty, frequency penalty, temperature, top-k, top-p,
typical-p. A draw inverts the cumulative distribution at a number that depends on (seed, position) alone, so the same
request makes the same draws in any batch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine.request import EngineRequest, Sampling, Token
from penstock.engine.sequence import Sequence

_NUCLEUS = 1024  # candidates tried before a whole row is sorted for top-p
_COLDEST = 1e-6  # temperatures below are greedy in float32 anyway
_HUGE = 1e30  # factors beyond have no more effect, but would overflow float32
_WATERMARK_PRIME = 15485863


@dataclass(frozen=True)
class Watermark:
    """Green-list watermark: `delta` is added to a share `gamma` of the vocabulary. (Kirchenbauer et al. 2023)"""

    gamma: float = 0.5
    delta: float = 2.0


class BrokenScores(ValueError):
    """The model's scores of a row are not numbers."""


def choose(logits: Tensor, sequences: list[Sequence], watermark: Watermark) -> list[Token | BrokenScores]:
    """The next token of each row, with log-probabilities and alternatives where its request asks for them.

    logits: [n, vocab] of any float type, row i for sequences[i]. Log-probabilities are of the processed scores. A row
    whose scores are NaN gives the error in place of a token; the others are not touched by it.
    """
    requests = [s.request for s in sequences]
    results: list[Token | BrokenScores | None] = [None] * len(requests)
    # rows that take the plain maximum and tell nothing more never leave the type the model computed in
    bare = [i for i, r in enumerate(requests) if r.sampling.plain and not r.logprobs and not r.top_n_tokens]
    rest = [i for i in range(len(requests)) if i not in set(bare)]
    if bare:
        best, ids = (logits if not rest else logits[bare]).max(dim=-1)
        for i, value, token_id in zip(bare, best.float().tolist(), ids.tolist(), strict=True):
            results[i] = Token(token_id) if value == value else BrokenScores()
    if rest:
        scores = (logits if not bare else logits[rest]).float()
        scores = process(scores, [sequences[i] for i in rest], watermark)
        ids = _pick(scores, [sequences[i] for i in rest])
        normalizer = torch.logsumexp(scores, dim=-1, keepdim=True)
        chosen = (scores.gather(1, ids.unsqueeze(1)) - normalizer).squeeze(1).tolist()
        for row, (i, token_id, logprob) in enumerate(zip(rest, ids.tolist(), chosen, strict=True)):
            if logprob != logprob:
                results[i] = BrokenScores()
                continue
            top = _top(scores[row] - normalizer[row], requests[i])
            results[i] = Token(token_id, logprob if requests[i].logprobs else None, top)
    return [result for result in results if result is not None]


def process(scores: Tensor, sequences: list[Sequence], watermark: Watermark) -> Tensor:
    """Apply every processor that a row asks for, in order. scores: [n, vocab] float32 -> the same, -inf = excluded."""
    samplings = [s.request.sampling for s in sequences]
    if any(not s.plain for s in samplings):
        scores = scores.clone()
    for row, (sampling, sequence) in enumerate(zip(samplings, sequences, strict=True)):
        if sampling.plain:
            continue
        _penalize(scores[row], sampling, sequence.ids, watermark)
        if sampling.temperature != 1.0:
            # from the maximum down, so that a tiny temperature leaves a greedy row and not infinities
            scores[row] -= scores[row].max()
            scores[row] /= min(max(sampling.temperature, _COLDEST), _HUGE)
        if sampling.top_k > 0:
            _keep_top_k(scores[row], sampling.top_k)
        if sampling.top_p < 1.0:
            _keep_top_p(scores[row], sampling.top_p)
        if sampling.typical_p < 1.0:
            _keep_typical(scores[row], sampling.typical_p)
    return scores


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one draw, a pure function of its arguments."""
    digest = hashlib.blake2b(seed.to_bytes(8, "little") + position.to_bytes(8, "little"), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def prompt_logprobs(logits: Tensor, targets: Tensor) -> list[float]:
    """Log-probability of each next prompt token. logits: [n, vocab]; targets: [n] -> n numbers."""
    scores = logits.float()
    chosen = scores.gather(1, targets.unsqueeze(1)).squeeze(1) - torch.logsumexp(scores, dim=-1)
    values: list[float] = chosen.tolist()
    return values


def _pick(scores: Tensor, sequences: list[Sequence]) -> Tensor:
    """The token of each row: the likeliest, or a draw. scores: [n, vocab] -> [n]."""
    ids = scores.argmax(dim=-1)
    drawn = [i for i, s in enumerate(sequences) if s.request.sampling.draws]
    if drawn:
        cumulative = torch.softmax(scores[drawn], dim=-1, dtype=torch.float64).cumsum(dim=-1)
        at = torch.tensor([[uniform(sequences[i].request.sampling.seed, len(sequences[i].ids))] for i in drawn])
        picked = torch.searchsorted(cumulative, at.double() * cumulative[:, -1:], right=True).squeeze(1)
        ids[drawn] = picked.clamp_max(scores.shape[1] - 1)
    return ids


def _penalize(row: Tensor, sampling: Sampling, ids: list[int], watermark: Watermark) -> None:
    """Watermark, repetition and frequency penalties, in place. row: [vocab]; ids: prompt and output so far."""
    if sampling.watermark:
        generator = torch.Generator().manual_seed(_WATERMARK_PRIME * ids[-1])
        green = torch.randperm(len(row), generator=generator)[: int(watermark.gamma * len(row))]
        row[green] += watermark.delta
    if sampling.repetition_penalty == 1.0 and sampling.frequency_penalty == 0.0:
        return
    seen, counts = torch.tensor(ids).unique(return_counts=True)
    if sampling.repetition_penalty != 1.0:  # Keskar et al. 2019
        values, penalty = row[seen], min(max(sampling.repetition_penalty, 1 / _HUGE), _HUGE)
        row[seen] = torch.where(values < 0, values * penalty, values / penalty)
    if sampling.frequency_penalty != 0.0:  # TGI's formula: relative to the length of the text
        row[seen] -= sampling.frequency_penalty * counts / len(ids)


def _keep_top_k(row: Tensor, k: int) -> None:
    """Exclude everything below the k-th largest; ties with it stay."""
    if k < len(row):
        row[row < row.topk(k).values[-1]] = float("-inf")


def _keep_top_p(row: Tensor, p: float) -> None:
    """Keep the likeliest tokens until their mass reaches p; at least one. (Holtzman et al. 2020)"""
    total = torch.logsumexp(row, dim=0)
    values, order = row.topk(min(_NUCLEUS, len(row)))
    mass = (values - total).exp().cumsum(0)
    if float(mass[-1]) < p and len(values) < len(row):
        values, order = row.sort(descending=True)
        mass = (values - total).exp().cumsum(0)
    keep = int((mass < p).sum()) + 1  # the token that crosses p is kept
    kept, kept_values = order[:keep], values[:keep]
    row.fill_(float("-inf"))
    row[kept] = kept_values


def _keep_typical(row: Tensor, p: float) -> None:
    """Keep the tokens whose surprise is nearest to the entropy until their mass reaches p. (Meister et al. 2023)"""
    logprobs = torch.log_softmax(row, dim=0)
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs.masked_fill(probabilities == 0, 0.0)).sum()
    order = (-logprobs - entropy).abs().argsort()
    mass = probabilities[order].cumsum(0)
    row[order[int((mass < p).sum()) + 1 :]] = float("-inf")


def _top(logprobs: Tensor, request: EngineRequest) -> list[tuple[int, float]]:
    """The likeliest tokens of a row, best first; ties with the last of them are all given. logprobs: [vocab]."""
    n = min(request.top_n_tokens, len(logprobs))
    if n == 0:
        return []
    threshold = logprobs.topk(n).values[-1]
    ids = (logprobs >= threshold).nonzero().squeeze(1)[: n + 64]  # a flat distribution ties everywhere
    values = logprobs[ids]
    order = values.argsort(descending=True, stable=True)
    return list(zip(ids[order].tolist(), values[order].tolist(), strict=True))
