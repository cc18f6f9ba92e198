"""The loop of a GPU, run on the processor: one step ahead it makes the tokens that the plain loop makes."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine.ahead import AheadLoop
from penstock.engine.config import EngineConfig
from penstock.engine.graphs import DecodeGraphs, _Graph
from penstock.engine.loop import EngineLoop
from penstock.engine.open import open_model
from penstock.engine.request import Embed, EngineRequest, Grammar, Sampling
from penstock.text.grammar import GrammarSpec, source_of
from tests.adapters import save_adapter
from tests.checkpoints import save_tiny
from tests.engine.driver import Generated, generate


def load(kind: type[EngineLoop], folder: Path, **options: Any) -> EngineLoop:
    config = EngineConfig(str(folder), dtype="float32", **options)
    return kind(open_model(config, lambda stage: None), config)


def a_request(number: int, rng: random.Random) -> EngineRequest:
    """Every way of choosing a token, in turn."""
    prompt = [rng.randrange(2, 512) for _ in range(rng.randrange(1, 90))]
    ways: list[dict[str, Any]] = [
        {},
        {"logprobs": True},
        {"sampling": Sampling(temperature=0.8, top_p=0.9, seed=number), "logprobs": True},
        {"sampling": Sampling(do_sample=True, top_k=20, min_p=0.01, seed=number)},
        {"sampling": Sampling(repetition_penalty=1.3)},
        {"sampling": Sampling(temperature=1.5, typical_p=0.9, count_penalty=0.5, seed=number)},
        {"top_n_tokens": 3, "logprobs": True},
        {"min_new_tokens": 6, "ignore_eos": False},
        {"stop_ids": list(range(0, 512, 9))},
        {"deterministic": True},
        {"prompt_logprobs": True},
        {"sampling": Sampling(logit_bias={7: 30.0}), "stop_ids": [7]},
    ]
    way = {"ignore_eos": True, **ways[number % len(ways)]}
    return EngineRequest(id=number, prompt_ids=prompt, max_new_tokens=rng.randrange(6, 30), **way)


def same(ours: dict[int, Generated], plain: dict[int, Generated]) -> None:
    for number, expected in plain.items():
        got = ours[number]
        assert (got.ids, got.finish, got.error) == (expected.ids, expected.finish, expected.error), number
        assert [p is None for p in got.logprobs] == [p is None for p in expected.logprobs]
        numbers = [p for p in got.logprobs if p is not None]
        assert numbers == pytest.approx([p for p in expected.logprobs if p is not None], abs=1e-4)
        assert [[i for i, _p in top] for top in got.top] == [[i for i, _p in top] for top in expected.top]
        assert got.prompt_logprobs == (
            expected.prompt_logprobs and pytest.approx(expected.prompt_logprobs, abs=1e-4, nan_ok=True)
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_prefill_tokens": 19, "max_batch_size": 5},
        {"max_batch_total_tokens": 256, "max_total_tokens": 128},
        {"prefix_caching": False, "block_size": 1},
    ],
)
def test_the_tokens_are_those_of_the_plain_loop(tiny_llama: Path, options: dict[str, Any]) -> None:
    rng = random.Random(1)
    requests = [a_request(number, rng) for number in range(36)]
    plain = generate(load(EngineLoop, tiny_llama, **options), requests)
    loop = load(AheadLoop, tiny_llama, **options)
    for _ in range(2):  # the second time with cached prefixes
        same(generate(loop, requests), plain)
        stats = loop.current_stats()
        assert stats.used_blocks == 0
        assert stats.free_blocks + stats.cached_blocks == stats.total_blocks
    if "max_batch_total_tokens" in options:
        assert loop.stats.preemptions > 0
    else:
        assert (loop.stats.cached_prompt_tokens > 0) == options.get("prefix_caching", True)


class Again:
    """Stands in for a captured graph: computes once more from and into the same memory."""

    def __init__(self, graphs: DecodeGraphs, inputs: torch.Tensor) -> None:
        self.graphs, self.inputs, self.count = graphs, inputs, 0
        self.outcome = graphs._compute(*inputs)

    def replay(self) -> None:
        self.count += 1
        for kept, made in zip(self.outcome, self.graphs._compute(*self.inputs), strict=True):
            kept.copy_(made)


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), (5, 16)])
def test_batches_filled_up_to_a_captured_size(tiny_llama: Path, sizes: tuple[int, ...], monkeypatch: Any) -> None:
    """What replays a batch of a larger size gives the tokens of the plain loop, whoever chooses them."""
    made: list[Again] = []

    def captured(graphs: DecodeGraphs, size: int) -> Any:
        inputs = torch.zeros((3, size), dtype=torch.int64)
        inputs[1] = graphs._rows.count
        made.append(Again(graphs, inputs))
        return _Graph(made[-1], inputs, made[-1].outcome)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodeGraphs, "_captured", captured)
    rng = random.Random(3)
    requests = [a_request(number, rng) for number in range(24)]
    loop = load(AheadLoop, tiny_llama, max_batch_size=9)
    assert isinstance(loop, AheadLoop)
    runner = loop._runner
    runner.graphs = DecodeGraphs(runner._decode, runner.rows, sizes)
    same(generate(loop, requests), generate(load(EngineLoop, tiny_llama, max_batch_size=9), requests))
    assert sum(graph.count for graph in made) > 20
    while loop.prepare():
        pass
    assert len(made) == len(runner.graphs.sizes) >= 2
    same(generate(loop, requests), generate(load(EngineLoop, tiny_llama, max_batch_size=9), requests))
    assert loop.current_stats().used_blocks == 0


def test_one_step_ahead_and_no_more(tiny_llama: Path) -> None:
    """A token comes one step late, a sequence that ends is computed once too often, a full one is not."""
    loop = load(AheadLoop, tiny_llama)
    plain = generate(load(EngineLoop, tiny_llama), [EngineRequest(0, [5, 6, 7], 8, ignore_eos=True)])[0].ids
    loop.add(EngineRequest(0, [5, 6, 7], 8, ignore_eos=True))
    assert [len(loop.step().outputs) for _ in range(10)] == [0, *[1] * 8, 0]
    assert loop.stats.steps == 8
    loop.add(EngineRequest(1, [5, 6, 7], 8, ignore_eos=True, stop_ids=[plain[3]]))
    steps, tokens = loop.stats.steps, []
    while loop.has_work:
        tokens += [token.id for output in loop.step().outputs for token in output.tokens]
    assert tokens == plain[: plain.index(plain[3]) + 1]
    assert loop.stats.steps - steps == len(tokens) + 1
    loop.step()
    assert loop.current_stats().used_blocks == 0


def test_an_abort_while_a_step_is_under_way(tiny_llama: Path) -> None:
    loop, requests = (
        load(AheadLoop, tiny_llama),
        [EngineRequest(i, [9 + i] * 20, 12, ignore_eos=True) for i in range(4)],
    )
    plain = generate(load(EngineLoop, tiny_llama), requests)
    for request in requests:
        loop.add(request)
    got: dict[int, list[int]] = {i: [] for i in range(4)}
    for step in range(40):
        if step == 5:
            loop.abort(1)
            loop.add(EngineRequest(1, [3] * 40, 2, ignore_eos=True))  # the same number again, at once
        for output in loop.step().outputs:
            got[output.id] += [token.id for token in output.tokens]
    assert all(got[i] == plain[i].ids for i in (0, 2, 3))
    assert len(got[1]) < 12
    assert loop.current_stats().used_blocks == 0


def test_grammars_and_embeddings_beside_others(tiny_llama: Path) -> None:
    requests = [
        EngineRequest(0, [5, 6, 7], 20, grammar=Grammar(source_of(GrammarSpec("regex", "[0-9]{6}")))),
        EngineRequest(1, [8] * 30, 20, ignore_eos=True),
        EngineRequest(2, [9] * 40, 0, embed=Embed()),
    ]
    same(generate(load(AheadLoop, tiny_llama), requests), generate(load(EngineLoop, tiny_llama), requests))


def test_adapters_beside_others(tiny_llama: Path, tmp_path: Path) -> None:
    folder = save_adapter(tiny_llama, tmp_path / "adapter")
    rng = random.Random(4)
    prompts = [[rng.randrange(2, 512) for _ in range(20)] for _ in range(9)]
    requests = [
        EngineRequest(i, prompt, 12, ignore_eos=True, adapter="a" if i % 3 else None)
        for i, prompt in enumerate(prompts)
    ]
    options: dict[str, Any] = {"adapters": {"a": str(folder)}, "max_batch_prefill_tokens": 50}
    plain = generate(load(EngineLoop, tiny_llama, **options), requests)
    same(generate(load(AheadLoop, tiny_llama, **options), requests), plain)


@pytest.mark.parametrize("family", ["gemma-2", "phi-4-mini", "mixtral", "falcon-rw", "deepseek-v2-lite"])
def test_other_families(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path / "model", family)
    rng = random.Random(2)
    requests = [a_request(number, rng) for number in range(9)]
    plain = generate(load(EngineLoop, folder), requests)
    same(generate(load(AheadLoop, folder, max_batch_prefill_tokens=50), requests), plain)


@pytest.mark.parametrize("kind", [EngineLoop, AheadLoop])
def test_a_step_without_memory_fails_its_batch_only(
    tiny_llama: Path, kind: type[EngineLoop], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = load(kind, tiny_llama, max_batch_size=3)
    requests = [EngineRequest(i, [9 + i] * 20, 12, ignore_eos=True) for i in range(6)]
    plain = generate(load(EngineLoop, tiny_llama), requests)
    forward, calls = loop._decoder.forward, 0

    def starved(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*arguments)

    monkeypatch.setattr(loop._decoder, "forward", starved)
    with caplog.at_level(logging.CRITICAL):
        got = generate(loop, requests)
    assert [got[i].finish for i in range(6)] == ["error"] * 3 + ["length"] * 3
    assert all(got[i].ids == plain[i].ids for i in range(3, 6))
    assert all(got[i].ids == plain[i].ids[: len(got[i].ids)] and len(got[i].ids) in (2, 3) for i in range(3))
    assert loop.current_stats().used_blocks == 0


def test_scores_that_are_not_numbers_end_one_request(tiny_llama: Path) -> None:
    loop = load(AheadLoop, tiny_llama)
    loop._decoder.weights.embedding[300] = float("nan")
    got = generate(loop, [EngineRequest(0, [5, 300], 8), EngineRequest(1, [5, 6], 8, ignore_eos=True)])
    assert got[0].error is not None
    assert "not numbers" in got[0].error
    assert (got[1].finish, len(got[1].ids)) == ("length", 8)
