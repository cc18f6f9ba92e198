"""Greedy fp32 output equals transformers' token for token, whatever the batch, chunks, cache or preemption."""

from __future__ import annotations

import json
import random
from array import array
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest
from penstock.engine.scheduler import Run
from penstock.engine.sequence import Sequence
from penstock.engine.step import GATHERED, build_step
from penstock.models.families import describe
from tests.checkpoints import ROPES, save_tiny
from tests.engine.driver import generate

NEW = 128


def prompts(count: int = 20, longest: int = 90, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, 512) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def reference(folder: Path, rows: list[list[int]], new: int = NEW) -> list[list[int]]:
    """transformers' greedy continuation of each prompt, end of sequence ignored.

    A fresh model for each: with dynamic rope scaling transformers carries the longest length over to later calls.
    """
    out = []
    for row in rows:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generation_config.eos_token_id = None
        ids = model.generate(
            torch.tensor([row]),
            max_new_tokens=new,
            do_sample=False,
            attention_mask=torch.ones(1, len(row)).long(),
        )
        out.append(ids[0, len(row) :].tolist())
    return out


def requests(rows: list[list[int]], new: int = NEW) -> list[EngineRequest]:
    return [EngineRequest(id=i, prompt_ids=row, max_new_tokens=new, ignore_eos=True) for i, row in enumerate(rows)]


@pytest.mark.parametrize("kind", ROPES)
def test_rope_scalings_match_transformers(kind: str, tmp_path: Path) -> None:
    """Prompts on both sides of the original context, generation across it."""
    rope = {"rope_theta": 10000.0, **ROPES[kind]}
    positions = 128 if kind == "dynamic" else 512
    folder = save_tiny(tmp_path / "model", "llama", rope_parameters=rope, max_position_embeddings=positions)
    rows = prompts(6, 60) + [p * 2 for p in prompts(4, 75, seed=1)]
    expected = reference(folder, rows, 100)
    for config in (
        EngineConfig(str(folder), dtype="float32"),
        EngineConfig(str(folder), dtype="float32", max_batch_prefill_tokens=17, max_batch_total_tokens=512),
    ):
        got = generate(EngineLoop.load(config), requests(rows, 100))
        assert [got[i].ids for i in range(len(rows))] == expected


def test_sharded_checkpoint(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    rows = prompts(3)
    got = generate(EngineLoop.load(EngineConfig(str(folder), dtype="float32")), requests(rows))
    assert [got[i].ids for i in range(3)] == reference(folder, rows)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_output_does_not_depend_on_the_schedule(family: str, tmp_path: Path) -> None:
    """Batch composition, chunk size, prefix cache and preemption change nothing."""
    folder = save_tiny(tmp_path / "model", family)
    shared = prompts(1, 90, seed=5)[0]
    rows = prompts(10) + [shared + p for p in prompts(6, 20, seed=6)]
    alone = EngineLoop.load(EngineConfig(str(folder), dtype="float32", prefix_caching=False))
    expected = {}
    for request in requests(rows):
        expected.update(generate(alone, [request]))
    assert alone.stats.cached_prompt_tokens == 0

    def run(**options: int | bool) -> EngineLoop:
        engine = EngineLoop.load(EngineConfig(str(folder), dtype="float32", **options))  # type: ignore[arg-type]
        order = requests(rows)
        random.Random(len(options)).shuffle(order)
        for _ in range(2):
            assert generate(engine, order) == expected
            assert engine.stats.used_blocks == 0
            assert engine.stats.free_blocks + engine.stats.cached_blocks == engine.stats.total_blocks
        return engine

    assert run().stats.cached_prompt_tokens > 0
    run(max_batch_size=3)
    run(max_batch_prefill_tokens=7)
    run(block_size=1)
    squeezed = run(max_batch_total_tokens=512, max_total_tokens=320)
    assert squeezed.stats.preemptions > 0
    bare = run(max_batch_total_tokens=512, max_total_tokens=320, prefix_caching=False, max_batch_prefill_tokens=33)
    assert bare.stats.preemptions > 0
    assert bare.stats.cached_prompt_tokens == 0


def test_logprobs_match_transformers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    row = prompts(1, 60, seed=3)[0]
    engine = EngineLoop.load(EngineConfig(str(folder), dtype="float32", max_batch_prefill_tokens=13))
    request = EngineRequest(
        id=0,
        prompt_ids=row,
        max_new_tokens=20,
        ignore_eos=True,
        logprobs=True,
        top_n_tokens=3,
        prompt_logprobs=True,
    )
    out = generate(engine, [request])[0]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        scores = model(torch.tensor([row + out.ids])).logits[0].log_softmax(-1)
    for i, token_id in enumerate(out.ids):
        at = scores[len(row) - 1 + i]
        assert out.logprobs[i] == pytest.approx(at[token_id].item(), abs=1e-3)
        best = at.topk(3)
        assert [t for t, _ in out.top[i]] == best.indices.tolist()
        assert [p for _, p in out.top[i]] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs[0] is None
    assert out.prompt_logprobs[1:] == pytest.approx(
        [scores[i, row[i + 1]].item() for i in range(len(row) - 1)], abs=1e-3
    )


def test_one_long_sequence_does_not_widen_the_short_ones() -> None:
    """Decoding runs share a rectangle only with contexts of about their length, and each gathers a bounded size."""

    def decoding(number: int, context: int) -> Run:
        sequence = Sequence.of(EngineRequest(number, [1] * context, 1), number, b"", None)
        sequence.computed = context - 1
        sequence.blocks = array("q", range(-(-context // 16)))
        return Run(sequence, 1)

    runs = [decoding(i, 100 + i % 7) for i in range(31)] + [decoding(31, 8000)]
    runs += [decoding(32 + i, 3000) for i in range(40)]
    step = build_step(runs, 16, with_spans=False)
    gathered = sum(g.blocks.numel() * 16 for g in step.inputs.groups)
    assert gathered <= 2 * sum(len(run.sequence.ids) + 16 for run in runs)
    assert all(g.blocks.numel() * 16 <= GATHERED for g in step.inputs.groups if g.batch > 1)
    assert sum(g.batch for g in step.inputs.groups) == len(runs)
    ends = [g.end for g in step.inputs.groups]
    assert ends == sorted(ends)
    assert ends[-1] == len(step.inputs.ids)


def test_long_prompts_are_scored_in_slices(tmp_path: Path) -> None:
    """A prompt of several slices, alone and beside others, in chunks and at once, with and without a window."""
    for family in ("llama", "mistral"):
        folder = save_tiny(tmp_path / family, family, max_position_embeddings=2048, num_hidden_layers=2)
        rows = [prompts(1, 90, seed=i)[0] * 40 for i in range(2)] + prompts(3)
        rows = [row[:1500] for row in rows]
        expected = reference(folder, rows, 12)
        for budget in (2048, 700):
            engine = EngineLoop.load(EngineConfig(str(folder), dtype="float32", max_batch_prefill_tokens=budget))
            got = generate(engine, requests(rows, 12))
            assert [got[i].ids for i in range(len(rows))] == expected


def test_a_stored_head_beats_a_tied_flag(tmp_path: Path) -> None:
    """A checkpoint that says its head is tied but stores another: transformers uses the stored one, and so do we."""
    folder = save_tiny(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    rows = prompts(2)
    got = generate(EngineLoop.load(EngineConfig(str(folder), dtype="float32")), requests(rows, 40))
    assert [got[i].ids for i in range(2)] == reference(folder, rows, 40)


def test_an_absent_window_is_mistrals_default(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mistral")
    config = json.loads((folder / "config.json").read_text())
    for value, expected in (("absent", 4096), (None, None), (24, 24)):
        config["sliding_window"] = value
        if value == "absent":
            del config["sliding_window"]
        (folder / "config.json").write_text(json.dumps(config))
        described, _names = describe(folder)
        assert set(described.windows) == {expected}
        assert AutoConfig.from_pretrained(folder).sliding_window == expected


def test_bfloat16_in_chunks(tmp_path: Path) -> None:
    """Steps in the middle of a prompt, from which nothing but keys and values is wanted, in half precision too."""
    folder = save_tiny(tmp_path / "model", "llama")
    engine = EngineLoop.load(EngineConfig(str(folder), dtype="bfloat16", max_batch_prefill_tokens=16))
    results = generate(engine, requests(prompts(4, 90), 8))
    assert all(len(r.ids) == 8 and r.finish == "length" for r in results.values())


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    """The packed half-precision path: likeliest tokens of the float32 model stay among its five likeliest."""
    folder = save_tiny(tmp_path / "model", "llama")
    row = prompts(1, 60, seed=4)[0]

    def top(dtype: str) -> list[int]:
        engine = EngineLoop.load(EngineConfig(str(folder), dtype=dtype))
        request = EngineRequest(id=0, prompt_ids=row, max_new_tokens=1, top_n_tokens=5, ignore_eos=True)
        return [t for t, _ in generate(engine, [request])[0].top[0]]

    exact, half = top("float32"), top("bfloat16")
    assert exact[0] in half
    assert half[0] in exact
