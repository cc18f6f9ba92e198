"""The loop of a GPU, run on the processor: one step ahead it makes the tokens that the plain loop makes."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.engine import chooser
from penstock.engine.ahead import AheadLoop
from penstock.engine.config import EngineConfig
from penstock.engine.grammar import Cursor
from penstock.engine.graphs import Captured, DecodeGraphs
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

    def __init__(self, graphs: DecodeGraphs, inputs: torch.Tensor, *way: Any) -> None:
        self.graphs, self.inputs, self.way, self.count = graphs, inputs, way, 0
        self.outcome = graphs._compute(*inputs, *way)

    def replay(self) -> None:
        self.count += 1
        for kept, made in zip(self.outcome, self.graphs._compute(*self.inputs, *self.way), strict=True):
            kept.copy_(made)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Again]:
    """What stands in for the graphs that are captured from now on."""
    all_of_them: list[Again] = []

    def captured(graphs: DecodeGraphs, size: int, *way: Any) -> Captured:
        inputs = torch.zeros((3, size), dtype=torch.int64)
        inputs[1] = graphs._rows.count
        all_of_them.append(Again(graphs, inputs, *way))
        return Captured(all_of_them[-1], size, inputs, all_of_them[-1].outcome)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodeGraphs, "_captured", captured)
    return all_of_them


def load_captured(folder: Path, sizes: tuple[int, ...], **options: Any) -> AheadLoop:
    loop = load(AheadLoop, folder, **options)
    assert isinstance(loop, AheadLoop)
    loop._runner.graphs = DecodeGraphs(loop._runner._decode, loop._runner.rows, sizes)
    return loop


@pytest.mark.parametrize("sizes", [(1, 2, 4, 8), (5, 16)])
def test_batches_filled_up_to_a_captured_size(tiny_llama: Path, sizes: tuple[int, ...], made: list[Again]) -> None:
    """What replays a batch of a larger size gives the tokens of the plain loop, whoever chooses them."""
    rng = random.Random(3)
    requests = [a_request(number, rng) for number in range(24)]
    loop = load_captured(tiny_llama, sizes, max_batch_size=9)
    same(generate(loop, requests), generate(load(EngineLoop, tiny_llama, max_batch_size=9), requests))
    assert sum(graph.count for graph in made) > 20
    while loop.prepare():
        pass
    plain = [graph for graph in made if graph.way == (False, None)]
    assert len(plain) == len(loop._runner.graphs.sizes) >= 2
    same(generate(loop, requests), generate(load(EngineLoop, tiny_llama, max_batch_size=9), requests))
    assert loop.current_stats().used_blocks == 0


def test_a_deterministic_request_is_captured_and_gives_the_same_bits(tiny_llama: Path, made: list[Again]) -> None:
    """Before its step is captured and after, alone and in company."""
    asked = EngineRequest(0, list(range(2, 150)), 24, ignore_eos=True, logprobs=True, deterministic=True)
    others = [EngineRequest(i, [i] * 20, 24, ignore_eos=True) for i in range(1, 6)]
    plain = generate(load(AheadLoop, tiny_llama), [asked])[0]
    loop = load_captured(tiny_llama, (2, 4, 8))
    for company in ([], others):
        found = generate(loop, [*company, asked])[0]
        assert (found.ids, found.logprobs) == (plain.ids, plain.logprobs)
    alone = [graph for graph in made if graph.way == (True, None)]
    assert [len(graph.inputs[0]) for graph in alone] == [1]
    assert alone[0].count > 30


def test_steps_of_one_adapter_are_captured(tiny_llama: Path, tmp_path: Path, made: list[Again]) -> None:
    options: dict[str, Any] = {
        "adapters": {name: str(save_adapter(tiny_llama, tmp_path / name, seed=i)) for i, name in enumerate("ab")}
    }
    ways = {"all of one": ["a"] * 5, "of two": ["a", "b", "a", "b"], "one without": ["a", None, "a"]}
    loop = load_captured(tiny_llama, (4, 8), **options)
    for what, names in ways.items():
        requests = [EngineRequest(i, [9 + i] * 20, 12, ignore_eos=True, adapter=name) for i, name in enumerate(names)]
        made.clear()
        same(generate(loop, requests), generate(load(EngineLoop, tiny_llama, **options), requests))
        of_adapters = {graph.way[1] for graph in made} - {None}
        assert of_adapters == ({loop.adapters.find("a").weights} if what == "all of one" else set())


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


def regex(pattern: str) -> Grammar:
    return Grammar(source_of(GrammarSpec("regex", pattern)))


def test_grammars_and_embeddings_beside_others(tiny_llama: Path) -> None:
    penalized = Sampling(repetition_penalty=1.4, count_penalty=0.5)
    requests = [
        EngineRequest(0, [5, 6, 7], 20, grammar=regex("[0-9]{6}")),
        EngineRequest(1, [8] * 30, 20, ignore_eos=True),
        EngineRequest(2, [9] * 40, 0, embed=Embed()),
        EngineRequest(3, [8, 5], 24, grammar=regex("(ab|cd)+ [a-z]{4,9}!"), logprobs=True),
        EngineRequest(4, [7] * 9, 30, grammar=regex("[a-z ]*"), sampling=Sampling(repetition_penalty=1.5)),
        EngineRequest(5, [6] * 5, 30, grammar=regex("[a-z ]*"), sampling=Sampling(temperature=0.9, seed=3)),
        EngineRequest(6, [6] * 5, 30, grammar=regex("[a-z]*"), min_new_tokens=9, top_n_tokens=2),
        EngineRequest(7, [6] * 7, 30, grammar=regex("fixed text, and (more|less) of it"), logprobs=True),
        EngineRequest(8, [6] * 7, 50, penalized, grammar=regex("[a-z]{3} forced, [a-z]{3} forced, [a-z ]*")),
    ]
    same(generate(load(AheadLoop, tiny_llama), requests), generate(load(EngineLoop, tiny_llama), requests))


def test_a_mask_that_is_there_in_time_goes_to_the_device(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of a sequence with a grammar stay where they are; one whose mask is late is chosen by the host."""
    loop = load(AheadLoop, tiny_llama)
    assert isinstance(loop, AheadLoop)
    plain = generate(load(EngineLoop, tiny_llama), [EngineRequest(0, [5, 6], 30, grammar=regex("[a-z ]*"))])[0]
    sides: list[str] = []
    launch = loop._runner.launch

    def watched(*arguments: Any) -> Any:
        flight = launch(*arguments)
        sides.extend(["device"] * len(flight.near) + ["host"] * len(flight.far))
        return flight

    monkeypatch.setattr(loop._runner, "launch", watched)
    assert generate(loop, [EngineRequest(0, [5, 6], 30, grammar=regex("[a-z ]*"))])[0].ids == plain.ids
    assert sides.count("device") > 20
    sides.clear()
    monkeypatch.setattr(Cursor, "ready", lambda self, seconds=0.0: seconds == 0.0 and self._moved)
    assert generate(loop, [EngineRequest(0, [5, 6], 30, grammar=regex("[a-z ]*"))])[0].ids == plain.ids
    assert set(sides) == {"host"}


def test_penalties_do_not_stop_the_loop(tiny_llama: Path) -> None:
    """A step for each token and none between, as with greedy ones; also of a sequence that ends before its last."""
    loop = load(AheadLoop, tiny_llama)
    sampling = Sampling(repetition_penalty=1.4, frequency_penalty=0.3, count_penalty=0.2, logit_bias={9: 0.5})
    requests = [EngineRequest(i, [5 + i, 6, 7], 12, sampling, ignore_eos=True, min_new_tokens=3) for i in range(3)]
    plain = generate(load(EngineLoop, tiny_llama), requests)
    same(generate(loop, requests), plain)
    assert loop.stats.steps == 12
    ends = [plain[0].ids[4]]
    requests = [EngineRequest(i, [5 + i, 6, 7], 12, sampling, ignore_eos=True, stop_ids=ends) for i in range(3)]
    for _ in range(2):
        same(generate(loop, requests), generate(load(EngineLoop, tiny_llama), requests))


def test_more_penalties_than_are_counted(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host chooses for those that have no counts on the device, until others end."""
    monkeypatch.setattr(chooser, "_COUNT_BYTES", 3 * chooser.count_bytes(512))
    loop = load(AheadLoop, tiny_llama, max_batch_total_tokens=256, max_total_tokens=128)
    assert isinstance(loop, AheadLoop)
    requests = [
        EngineRequest(i, [5 + i] * (20 + i), 40 + i, Sampling(presence_penalty=0.7, seed=i), ignore_eos=True)
        for i in range(14)
    ]
    same(generate(loop, requests), generate(load(EngineLoop, tiny_llama), requests))
    assert loop.stats.preemptions > 0
    assert len(loop._runner.chooser._free) == 3


def test_a_token_that_was_chosen_twice_counts_once(tiny_llama: Path) -> None:
    """A sequence that is preempted while its token is on its way, and at once computed again, gets that token once."""
    grammar = regex("[a-z ]*")
    request = EngineRequest(0, [5, 6, 7], 16, Sampling(repetition_penalty=1.5), grammar=grammar)
    plain = generate(load(EngineLoop, tiny_llama), [request])[0]
    loop = load(AheadLoop, tiny_llama)
    loop.add(request)
    got: list[int] = []
    step = 0
    while loop.has_work:
        step += 1
        sequence = loop._sequences[0]
        if step % 5 == 0 and sequence in loop._scheduler.running:
            loop._scheduler.running.remove(sequence)
            sequence.drop_blocks(loop._scheduler.pool)
            loop._scheduler.add(sequence)
        for output in loop.step().outputs:
            got += [token.id for token in output.tokens]
    assert got == plain.ids


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
