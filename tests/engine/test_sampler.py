"""Each processor against transformers' or its definition; draws against their distribution."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from penstock.engine import sampler
from penstock.engine.output import Token
from penstock.engine.request import EngineRequest, Sampling
from penstock.engine.sampler import BrokenScores, Watermark, prompt_logprobs, uniform
from penstock.engine.sequence import Sequence

MARK = Watermark()


def processed(raw: torch.Tensor, sequences: list[Sequence], watermark: Watermark) -> torch.Tensor:
    sampler.process(scores := raw.clone(), sequences, watermark)
    return scores


def choose(raw: torch.Tensor, sequences: list[Sequence], watermark: Watermark) -> list[Token | BrokenScores]:
    return sampler.choose(raw.clone(), sequences, watermark)


def row(ids: list[int], **options: Any) -> Sequence:
    """A sequence whose request samples as `options` say; the others go to the request."""
    eos = frozenset(options.pop("eos", ()))
    rest = {k: options.pop(k) for k in list(options) if k in EngineRequest.__struct_fields__}
    return Sequence.of(EngineRequest(1, ids, 10, Sampling(**options), **rest), 1, b"", None, eos)


def scores(seed: int, n: int = 1, vocab: int = 3000) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([1.0, 0.2, 1.7]),
    top_k=st.sampled_from([0, 1, 7, 2999, 5000]),
    top_p=st.sampled_from([1.0, 0.01, 0.5, 0.97, 0.9999]),
    typical_p=st.sampled_from([1.0, 0.2, 0.95]),
    repetition=st.sampled_from([1.0, 1.3, 0.7]),
)
def test_processors_match_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, typical_p: float, repetition: float
) -> None:
    raw, ids = scores(seed), [5, 9, 9, 2000, 17]
    expected = raw.double()  # in float32 the reference's own running sum drifts by several tokens near its end
    if repetition != 1.0:
        expected = RepetitionPenaltyLogitsProcessor(repetition)(torch.tensor([ids]), expected)
    for used, warper in (
        (temperature != 1.0, lambda: TemperatureLogitsWarper(temperature)),
        (top_k > 0, lambda: TopKLogitsWarper(top_k)),
        (top_p < 1.0, lambda: TopPLogitsWarper(top_p)),
        (typical_p < 1.0, lambda: TypicalLogitsWarper(typical_p)),
    ):
        if used:
            expected = warper()(torch.tensor([ids]), expected)
    sequence = row(
        ids,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        typical_p=typical_p,
        repetition_penalty=repetition,
    )
    got = processed(raw.clone(), [sequence], MARK)
    ours, theirs = got.isfinite(), expected.isfinite()
    # sums over thousands of numbers may put one borderline token on either side
    assert int((ours != theirs).sum()) <= 1
    both = ours & theirs
    assert torch.allclose(got[both].log_softmax(0), expected[both].log_softmax(0).float(), atol=1e-4)


@pytest.mark.parametrize("temperature", [1e-300, 1e-38, 1e-3, 1e30, 1e308])
@pytest.mark.parametrize("repetition", [1e-300, 1.0, 1e308])
def test_extreme_settings_still_choose(temperature: float, repetition: float) -> None:
    sequence = row([1, 5], temperature=temperature, repetition_penalty=repetition, logprobs=True, seed=3)
    (token,) = choose(scores(2), [sequence], MARK)
    assert isinstance(token, Token)
    assert 0 <= token.id < 3000
    if temperature < 1e-2 and repetition == 1.0:
        assert token.id == int(scores(2)[0].argmax())


def test_top_p_beyond_the_first_candidates() -> None:
    """A flat distribution: the nucleus is wider than what is tried before a full sort."""
    raw = torch.zeros(1, 5000) + torch.arange(5000) * 1e-6
    kept = int(processed(raw, [row([1], top_p=0.9)], MARK).isfinite().sum())
    assert 4480 <= kept <= 4520


def test_frequency_penalty_is_relative_to_the_length() -> None:
    raw = torch.zeros(1, 10)
    got = processed(raw, [row([3, 3, 3, 4], frequency_penalty=1.0)], MARK)[0]
    assert got[3].item() == pytest.approx(-0.75)
    assert got[4].item() == pytest.approx(-0.25)
    assert got[5].item() == 0


def test_watermark_lifts_a_green_list_of_the_previous_token() -> None:
    raw = torch.zeros(1, 1000)
    first = processed(raw, [row([3, 7], watermark=True)], Watermark(0.25, 4.0))
    again = processed(raw, [row([9, 9, 7], watermark=True)], Watermark(0.25, 4.0))
    other = processed(raw, [row([3, 8], watermark=True)], Watermark(0.25, 4.0))
    assert int((first == 4.0).sum()) == 250
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_do_not_touch_each_other() -> None:
    """A row's token and log-probability are the same alone and among rows that ask for everything else."""
    raw = scores(3, n=6)
    raw[4] = float("nan")
    sequences = [
        row([1, 2]),
        row([1, 2], do_sample=True, seed=11, logprobs=True),
        row([4, 4], temperature=0.3, top_k=5, seed=12, logprobs=True, top_n_tokens=3),
        row([4, 4], top_p=0.4, repetition_penalty=1.8, seed=13, logprobs=True),
        row([1], logprobs=True),
        row([1], watermark=True, typical_p=0.5, seed=14, logprobs=True),
    ]
    together = choose(raw, sequences, MARK)
    assert isinstance(together[4], BrokenScores)
    for i in (0, 1, 2, 3, 5):
        (alone,) = choose(raw[i : i + 1], sequences[i : i + 1], MARK)
        assert isinstance(alone, Token)
        assert alone == together[i]
    assert raw[0].isfinite().all()


def test_broken_scores_of_a_greedy_row() -> None:
    raw = scores(1, n=2)
    raw[0, 5] = float("nan")
    first, second = choose(raw, [row([1]), row([1])], MARK)
    assert isinstance(first, BrokenScores)
    assert second == Token(int(raw[1].argmax()))


def test_greedy_logprobs_are_the_models() -> None:
    raw = scores(8)
    (token,) = choose(raw, [row([1], logprobs=True, top_n_tokens=4)], MARK)
    expected = raw[0].log_softmax(0)
    assert isinstance(token, Token)
    assert token.logprob == pytest.approx(expected.max().item(), abs=1e-5)
    assert [t for t, _ in token.top] == expected.topk(4).indices.tolist()
    assert [p for _, p in token.top] == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


def test_ties_at_the_last_alternative_are_all_given() -> None:
    raw = torch.tensor([[5.0, 3.0, 3.0, 3.0, 1.0]])
    (token,) = choose(raw, [row([1], top_n_tokens=2)], MARK)
    assert isinstance(token, Token)
    assert [t for t, _ in token.top] == [0, 1, 2, 3]


def test_alternatives_are_the_best_ones_left() -> None:
    """Tokens that a processor excluded are no alternatives, and a late peak is not lost among ties."""
    (token,) = choose(scores(4), [row([1], top_k=2, seed=1, top_n_tokens=5)], MARK)
    assert isinstance(token, Token)
    assert [t for t, _ in token.top] == scores(4)[0].topk(2).indices.tolist()
    flat = torch.zeros(1, 3000)
    flat[0, 2500] = 9.0
    (token,) = choose(flat, [row([1], top_n_tokens=3)], MARK)
    assert isinstance(token, Token)
    assert token.top[0][0] == 2500
    assert 3 <= len(token.top) <= 80


def test_draws_follow_the_distribution() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125, 0.0]])
    counts: Counter[int] = Counter()
    n = 4000
    for seed in range(n):
        (token,) = choose(probabilities.log(), [row([1, 2], do_sample=True, seed=seed)], MARK)
        assert isinstance(token, Token)
        counts[token.id] += 1
    assert counts[4] == 0
    for token_id, p in enumerate(probabilities[0].tolist()):
        assert abs(counts[token_id] - n * p) < 5 * math.sqrt(n * p * (1 - p)) + 1


def test_draws_depend_on_seed_and_position_alone() -> None:
    numbers = [uniform(7, position) for position in range(1000)]
    assert numbers == [uniform(7, position) for position in range(1000)]
    assert all(0 <= u < 1 for u in numbers)
    assert abs(sum(numbers) / 1000 - 0.5) < 0.05
    assert uniform(7, 1) != uniform(8, 1) != uniform(8, 2)
    assert uniform(2**64 - 1, 0) != uniform(0, 0)


def test_count_and_presence_penalty_are_over_the_output() -> None:
    """OpenAI's: score -= count * count_penalty + (count > 0) * presence_penalty; the prompt does not count."""
    sequence = row([3, 3, 5], count_penalty=0.5, presence_penalty=0.25)
    raw = torch.zeros(1, 10)
    assert torch.equal(processed(raw, [sequence], MARK), raw)
    sequence.ids += [4, 4, 4, 3]
    got = processed(raw, [sequence], MARK)[0]
    assert got[4].item() == pytest.approx(-3 * 0.5 - 0.25)
    assert got[3].item() == pytest.approx(-0.5 - 0.25)
    assert got[5].item() == 0
    negative = row([1], count_penalty=-2.0)
    negative.ids += [4]
    assert processed(raw, [negative], MARK)[0, 4].item() == 2.0


def test_a_bias_bans_and_forces() -> None:
    raw = scores(5)
    best, worst = int(raw[0].argmax()), int(raw[0].argmin())
    (token,) = choose(raw, [row([1], logit_bias={best: -100.0}, logprobs=True)], MARK)
    assert isinstance(token, Token)
    assert token.id == int(raw[0].topk(2).indices[1])
    (token,) = choose(raw, [row([1], logit_bias={worst: 100.0}, logprobs=True, do_sample=True)], MARK)
    assert isinstance(token, Token)
    assert token.id == worst
    assert token.logprob == pytest.approx(0.0, abs=1e-3)
    got = processed(raw, [row([1], logit_bias={7: 1.5, 9: -2.0})], MARK) - raw
    assert got[0, 7].item() == pytest.approx(1.5, abs=1e-5)
    assert got[0, 9].item() == pytest.approx(-2.0, abs=1e-5)
    assert int((got != 0).sum()) == 2


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
def test_min_p_matches_transformers(min_p: float) -> None:
    raw = scores(9)
    expected = MinPLogitsWarper(min_p)(torch.tensor([[1]]), raw.clone())
    got = processed(raw, [row([1], min_p=min_p)], MARK)
    assert torch.equal(got.isfinite(), expected.isfinite())


def test_no_end_before_the_least_length() -> None:
    raw = torch.zeros(2, 6)
    raw[:, 1], raw[:, 4], raw[:, 2] = 9.0, 8.0, 7.0
    for options in ({}, {"logprobs": True, "do_sample": True, "seed": 5}):
        early, late = (row([3], min_new_tokens=2, stop_ids=[4], eos={1}, **options) for _ in range(2))
        late.ids += [5, 5]
        first, second = choose(raw, [early, late], MARK)
        assert isinstance(first, Token)
        assert isinstance(second, Token)
        assert first.id not in (1, 4)
        if not options:
            assert (first.id, second.id) == (2, 1)
    ignoring = row([3], min_new_tokens=2, stop_ids=[4], eos={1}, ignore_eos=True)
    (token,) = choose(raw[:1], [ignoring], MARK)
    assert token == Token(1)  # the end of sequence ends nothing here, so it may come
    assert raw[0, 1] == 9.0


def test_the_same_number_as_a_token_and_as_an_alternative() -> None:
    """lm-eval compares the two floats for equality, for output and prompt."""
    for seed in range(20):
        raw = scores(seed, n=4).bfloat16()
        requests = [row([1], logprobs=True, top_n_tokens=3, temperature=t, seed=seed) for t in (1.0, 0.7, 1.3, 2.0)]
        for token in choose(raw, requests, MARK):
            assert isinstance(token, Token)
            top = dict(token.top)
            assert token.id not in top or top[token.id] == token.logprob
        targets = raw.argmax(dim=-1)
        chosen, best = prompt_logprobs(raw, targets, 2)
        for target, logprob, alternatives in zip(targets.tolist(), chosen, best, strict=True):
            assert dict(alternatives)[target] == logprob == max(p for _, p in alternatives)
    assert prompt_logprobs(raw, targets)[1] == []
