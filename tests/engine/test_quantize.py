"""Weight formats in the engine: what they cost in quality, what they save in memory."""

from __future__ import annotations

import math

import pytest

from penstock.demo import model_path
from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest, Stage
from penstock.errors import UsageError
from penstock.text.tokenizer import Tokenizer, load_tokenizer
from tests.engine.driver import generate

WINDOW, WINDOWS = 512, 6


def load(stages: list[Stage], **options: str) -> EngineLoop:
    return EngineLoop.load(EngineConfig(str(model_path()), memory_fraction=0.3, **options), stages.append)


def tokenizer() -> Tokenizer:
    found = load_tokenizer(model_path())
    assert found is not None
    return found


def perplexity(engine: EngineLoop) -> float:
    text = (model_path() / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer().encode(text, add_special_tokens=False)
    windows = [[0, *ids[i * WINDOW : (i + 1) * WINDOW - 1]] for i in range(WINDOWS)]
    done = generate(engine, (EngineRequest(i, ids, 1, prompt_logprobs=True) for i, ids in enumerate(windows)))
    scores = [p for result in done.values() for p in (result.prompt_logprobs or [])[1:]]
    assert len(scores) == WINDOWS * (WINDOW - 1)
    return math.exp(-sum(p for p in scores if p is not None) / len(scores))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_int8_costs_less_than_one_per_cent_of_perplexity(dtype: str) -> None:
    """bfloat16 runs the compiled product where the processor has it, float32 its twin."""
    plain, small = perplexity(load([], dtype=dtype)), perplexity(load([], dtype=dtype, quantize="int8"))
    assert small < plain * 1.01


def test_int4_costs_less_than_four_per_cent_of_perplexity() -> None:
    plain, small = perplexity(load([], dtype="bfloat16")), perplexity(load([], dtype="bfloat16", quantize="int4"))
    assert small < plain * 1.04


def test_int8_is_said_and_counted() -> None:
    stages: list[Stage] = []
    engine = load(stages, dtype="bfloat16", quantize="int8")
    assert "its matrices in int8 (--quantize)" in stages[0].text
    assert "weights 6." in stages[1].text  # MiB: 5.4 million parameters, and the table of the vocabulary in bfloat16
    ids = tokenizer().encode("<|user|>How do I list my jobs on Slurm?<|assistant|>", True)
    answer = generate(engine, [EngineRequest(0, ids, 40)])[0]
    assert "squeue --me" in tokenizer().decode(answer.ids)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown format 'int3'"):
        load([], quantize="int3")
