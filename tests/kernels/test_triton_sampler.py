"""Penalties, masks, draws and log-probabilities as Triton kernels."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton cannot be imported on this machine", exc_type=ImportError)

from penstock.kernels.sampling import DrawRule
from penstock.kernels.triton.sampler import draw
from tests.kernels import triton_twins as twins

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, of infinities that are meant


@pytest.mark.parametrize(("vocab", "spread"), [(7, 1.0), (4096, 2.0), (5000, 6.0), (9000, 0.01)])
def test_draws_are_the_processors(vocab: int, spread: float) -> None:
    twins.draws(twins.seeded(vocab), twins.DEVICE, vocab, rows=6, spread=spread)


@pytest.mark.parametrize("vocab", [33, 3000])
def test_penalties_and_masks_equal_their_twins(vocab: int) -> None:
    twins.penalizes(twins.seeded(vocab), twins.DEVICE, vocab)


def test_without_a_temperature_the_likeliest_comes_with_its_probability() -> None:
    scores = torch.randn(3, 5000, dtype=torch.bfloat16, device=twins.DEVICE)
    greedy = twins.rules_of([DrawRule(0.0, 0.5, 0.0, 3, 0.7)] * 3, [0.5] * 3, twins.DEVICE)
    ids, logprobs = draw(scores, greedy)
    assert ids.tolist() == scores.float().argmax(dim=1).tolist()
    torch.testing.assert_close(logprobs, scores.float().log_softmax(1).amax(dim=1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_not_numbers_say_so_and_spare_their_neighbours(temperature: float) -> None:
    scores = torch.zeros(4, 100, device=twins.DEVICE)
    scores[0, 50] = float("nan")
    scores[1] = float("-inf")
    scores[2, 3] = float("inf")
    scores[3, 60:] = float("-inf")
    ids, logprobs = draw(
        scores, twins.rules_of([DrawRule(temperature, 1.0, 0.0, 0, 0.999)] * 4, [1.0] * 4, twins.DEVICE)
    )
    assert logprobs[:3].isnan().all()
    assert float(logprobs[3]) == pytest.approx(-math.log(60), abs=1e-6)
    assert int(ids[3]) == (59 if temperature else 0)
