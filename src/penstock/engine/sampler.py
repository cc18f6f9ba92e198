"""From scores to the next token of each row.

The processors run in TGI's order: watermark, repetition penalty, frequency penalty, grammar, temperature, top-k, top-p,
typical-p. What TGI has not is put where its users know it from: the bias of single tokens is part of the raw scores,
OpenAI's penalties stand beside TGI's, the minimum length beside the grammar, min-p is last. A draw inverts the
cumulative distribution at a number that depends on (seed, position) alone, so the same request makes the same draws in
any batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.engine.output import Token
from penstock.engine.request import EngineRequest, Sampling
from penstock.engine.sequence import Sequence
from penstock.kernels.penalty import Penalty, Tally
from penstock.kernels.sampling import (
    DrawRule,
    cool,
    draw,
    inverted,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    largest,
    penalize,
    restrict,
)

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
    results: list[Token | BrokenScores | None] = [None] * len(sequences)
    # rows that take the plain maximum and tell nothing more never leave the type the model computed in
    bare = [i for i, s in enumerate(sequences) if s.bare]
    rest = [i for i, s in enumerate(sequences) if not s.bare]
    if bare:
        scores = logits if not rest else logits[bare]
        best, ids = _likeliest(scores, [sequences[i] for i in bare])
        for i, value, token_id in zip(bare, best.float().tolist(), ids.tolist(), strict=True):
            results[i] = Token(token_id) if value > _EXCLUDED else BrokenScores()
    if rest:
        scores = (logits if not bare else logits[rest]).float()
        chosen = _choose_among(scores, [sequences[i] for i in rest], watermark)
        for i, token in zip(rest, chosen, strict=True):
            results[i] = token
    return [result for result in results if result is not None]


def process(scores: Tensor, sequences: list[Sequence], watermark: Watermark) -> None:
    """Apply every processor that a row asks for, in order and in place. scores: [n, vocab] float32, -inf = excluded."""
    _prepare(scores, sequences, watermark)
    for row, sequence in enumerate(sequences):
        _sharpen(scores[row], sequence.request.sampling)


def _choose_among(scores: Tensor, sequences: list[Sequence], watermark: Watermark) -> list[Token | BrokenScores]:
    """`choose` for rows that are drawn, changed, or tell more than their token. scores: [n, vocab] float32."""
    _prepare(scores, sequences, watermark)
    simple = [i for i, s in enumerate(sequences) if draws_simply(s.request)]
    others = sorted(set(range(len(sequences))) - set(simple))
    results: dict[int, Token | BrokenScores] = {}
    if simple:
        rules = [draw_rule(sequences[i]) for i in simple]
        ids, logprobs = draw(scores if not others else scores[simple], rules)
        for i, token_id, logprob in zip(simple, ids.tolist(), logprobs.tolist(), strict=True):
            results[i] = _token(token_id, logprob, sequences[i].request)
    if others:
        rest = scores if not simple else scores[others]
        for row, i in zip(rest, others, strict=True):
            _sharpen(row, sequences[i].request.sampling)
        ids = _pick(rest, [sequences[i] for i in others])
        logprobs = rest - torch.logsumexp(rest, dim=-1, keepdim=True)
        chosen = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1).tolist()
        for row, i, token_id, logprob in zip(logprobs, others, ids.tolist(), chosen, strict=True):
            request = sequences[i].request
            results[i] = _token(token_id, logprob, request, _top(row, request.top_n_tokens))
    return [results[i] for i in range(len(sequences))]


def _token(
    token_id: int, logprob: float, request: EngineRequest, top: list[tuple[int, float]] | None = None
) -> Token | BrokenScores:
    if logprob != logprob:
        return BrokenScores()
    return Token(token_id, logprob if request.logprobs else None, top or [])


def draws_simply(request: EngineRequest) -> bool:
    """Whether one pass over the scores draws the token; the rest needs all scores as they are in the end."""
    return request.sampling.draws and request.sampling.typical_p >= 1.0 and not request.top_n_tokens


def draw_rule(sequence: Sequence) -> DrawRule:
    """How the next token of a sequence is drawn."""
    s = sequence.request.sampling
    temperature = min(max(s.temperature, _COLDEST), _HUGE)
    return DrawRule(temperature, s.top_p, s.min_p, s.top_k, uniform(s.seed, len(sequence.ids) + sequence.ahead))


def _prepare(scores: Tensor, sequences: list[Sequence], watermark: Watermark) -> None:
    """What comes before the temperature, in place: bias, watermark, penalties, grammar."""
    for row, sequence in enumerate(sequences):
        if not sequence.request.sampling.plain:
            _shift(scores[row], sequence, watermark)
    penalties = [_penalty(sequence) for sequence in sequences]
    if any(penalties):
        penalize(scores, penalties)
    _restrict(scores, sequences)


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


def _likeliest(scores: Tensor, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """The largest score of each row among what may come, and its place; -inf where nothing may. scores: [n, vocab], may
    be changed -> two [n]

    A grammar is first asked about the likeliest token alone: where it may come, no mask need be made.
    """
    guesses = [(i, s, s.cursor) for i, s in enumerate(sequences) if s.cursor is not None and s.cursor.guesses()]
    fine: set[int] = set()
    if guesses:
        best, ids = largest(scores)
        values, likely = best.tolist(), ids.tolist()
        for i, sequence, cursor in guesses:
            end = likely[i] in cursor.ends or likely[i] in sequence.ends  # may be withheld
            if values[i] > _EXCLUDED and not end and cursor.take(likely[i]):
                fine.add(i)
        if len(fine) == len(sequences):
            return best, ids
    _restrict(scores, sequences, fine)
    return largest(scores)


def _restrict(scores: Tensor, sequences: list[Sequence], fine: Set[int] = frozenset()) -> None:
    """Exclude, in place, what a grammar does not allow, and what would end a sequence too early, unless its grammar
    leaves nothing else. scores: [n, vocab]; fine: rows whose largest score may come."""
    masks = [None if s.cursor is None or i in fine else s.cursor.mask() for i, s in enumerate(sequences)]
    withheld = [[] if i in fine else s.withheld for i, s in enumerate(sequences)]
    if any(withheld) or any(mask is not None for mask in masks):
        restrict(scores, masks, withheld)


def _pick(scores: Tensor, sequences: list[Sequence]) -> Tensor:
    """The token of each row: the likeliest, or a draw. scores: [n, vocab] -> [n]."""
    ids = scores.argmax(dim=-1)
    for i, sequence in enumerate(sequences):
        if sequence.request.sampling.draws:
            ids[i] = inverted(scores[i], uniform(sequence.request.sampling.seed, len(sequence.ids)))
    return ids


def _shift(row: Tensor, sequence: Sequence, watermark: Watermark) -> None:
    """Bias and watermark, in place. row: [vocab]."""
    sampling = sequence.request.sampling
    if sampling.logit_bias:
        row[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()))
    if sampling.watermark:
        generator = torch.Generator().manual_seed(_WATERMARK_PRIME * sequence.ids[-1])
        green = torch.randperm(len(row), generator=generator)[: int(watermark.gamma * len(row))]
        row[green] += watermark.delta


def _penalty(sequence: Sequence) -> Penalty | None:
    s = sequence.request.sampling
    if not s.penalizes:
        return None
    sequence.tally = sequence.tally or Tally()
    sequence.tally.follow(sequence.text_ids, sequence.given - sequence.encoded)
    return Penalty(sequence.tally, repetition_of(s), s.frequency_penalty, s.count_penalty, s.presence_penalty)


def repetition_of(sampling: Sampling) -> float:
    """The repetition penalty, within what float32 can multiply and divide by."""
    return min(max(sampling.repetition_penalty, 1 / _HUGE), _HUGE)


def _sharpen(row: Tensor, sampling: Sampling) -> None:
    """Temperature, and the rules that keep only the likelier tokens, in place. row: [vocab]."""
    if sampling.temperature != 1.0:
        cool(row, min(max(sampling.temperature, _COLDEST), _HUGE))
    if sampling.top_k > 0:
        keep_top_k(row, sampling.top_k)
    if sampling.top_p < 1.0:
        keep_top_p(row, sampling.top_p)
    if sampling.typical_p < 1.0:
        _keep_typical(row, sampling.typical_p)
    if sampling.min_p > 0.0:
        keep_min_p(row, sampling.min_p)


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
