"""Every family of decoders against transformers: tokens, logits, defaults, formats, memory, the recipe."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from penstock.engine.config import EngineConfig
from penstock.engine.load import planned_weight_bytes
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest
from penstock.errors import ModelError
from penstock.formats import FORMATS
from penstock.hub.checkpoint import read_checkpoint
from penstock.kernels.rotary import arrangement
from penstock.models.config import DecoderConfig, ExpertsConfig, NormConfig, WeightMap
from penstock.models.experts import route
from penstock.models.families import FAMILIES, describe
from penstock.models.family import Family
from penstock.models.reader import ConfigReader
from penstock.models.table import families_table
from tests.checkpoints import save_model
from tests.engine.driver import generate
from tests.engine.exactness import compare, compare_random, made_prompts
from tests.families import RANDOM, SHAPES, TOKENS

LONG = bool(os.environ.get("PENSTOCK_LONG_TESTS"))  # the full matrix, some ten minutes


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_and_logits_match_transformers(name: str, tmp_path: Path) -> None:
    """A batch of mixed lengths, in chunks, twice over (the second time with cached prefixes)."""
    folder = save_model(tmp_path, SHAPES[name])
    rows = made_prompts(20 if LONG else 4, 90, 512)
    difference = compare(folder, rows, 128 if LONG else 48, by_generation=LONG, max_batch_prefill_tokens=64)
    assert difference.exact, difference


@pytest.mark.parametrize("name", SHAPES if LONG else ["gemma-2", "falcon-rw", "llama4", "opt-350m", "deepseek-v2-lite"])
def test_the_schedule_changes_nothing(name: str, tmp_path: Path) -> None:
    """Odd chunks, blocks of one token, few rows; a cache so small that sequences are preempted."""
    folder = save_model(tmp_path, SHAPES[name])
    rows = made_prompts(8, 60, 512, seed=1)
    new = 48
    requests = [EngineRequest(id=i, prompt_ids=row, max_new_tokens=new, ignore_eos=True) for i, row in enumerate(rows)]
    expected = None
    for options in (
        {"prefix_caching": False, "max_batch_size": 1},
        {"max_batch_prefill_tokens": 7, "block_size": 1},
        {"max_batch_total_tokens": 112, "max_total_tokens": 112},
    ):
        engine = EngineLoop.load(EngineConfig(str(folder), dtype="float32", **options))  # type: ignore[arg-type]
        got = {i: result.ids for i, result in generate(engine, requests).items()}
        expected = expected or got
        assert got == expected, options
    assert engine.stats.preemptions > 0


@pytest.mark.parametrize("model_type", RANDOM)
def test_random_configurations(model_type: str) -> None:
    """Switches turned at random; `python -m tests.engine.exactness --count 100` turns more."""
    for seed in range(20 if LONG else 2):
        options, difference = compare_random(model_type, seed, new=12)
        assert difference.exact, (options, difference)


def test_layers_named_as_sliding_slide_without_the_flag(tmp_path: Path) -> None:
    """SmolLM3: `use_sliding_window` counts only where no layer is named."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    options = SHAPES["smollm3"] | {"num_hidden_layers": 4, "sliding_window": 9, "layer_types": kinds}
    assert not options.get("use_sliding_window")
    assert compare(save_model(tmp_path, options), made_prompts(3, 60, 512), 16).exact


def test_experts_outside_the_best_groups_are_not_asked() -> None:
    """Though corrected scores may be below zero; and where there are too few inside, those outside weigh nothing."""
    two = ExpertsConfig(layers=(True,), count=4, top_k=2, intermediate_size=1, groups=2, scoring="sigmoid")
    chosen, _ = route(torch.zeros(1, 4), two, torch.tensor([-2.0, -2.0, -3.0, -3.0]))
    assert sorted(chosen[0].tolist()) == [0, 1]
    every = replace(two, top_k=4, scoring="softmax")
    chosen, weights = route(torch.tensor([[1.0, 0.0, 0.0, 0.5]]), every)
    assert {int(e) for e, weight in zip(chosen[0], weights[0], strict=True) if weight > 0} == {0, 1}


@pytest.mark.parametrize("crossing", [False, True])
def test_longrope_beyond_the_original_context(crossing: bool, tmp_path: Path) -> None:
    """Prompts on both sides of it, and texts that outgrow it while they are made: all is then computed anew."""
    folder = save_model(tmp_path, SHAPES["phi-4-mini"])
    lengths = (100, 126, 127, 128) if crossing else (40, 129, 150)
    rows = [made_prompts(1, 300, 512, seed=n)[0] * 9 for n in range(len(lengths))]
    rows = [(row * 200)[:n] for row, n in zip(rows, lengths, strict=True)]
    difference = compare(folder, rows, 40, by_generation=True, max_batch_prefill_tokens=50)
    assert difference.exact, difference


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_absent_keys_mean_what_they_mean_to_transformers(model_type: str) -> None:
    stated = AutoConfig.for_model(model_type).to_dict()
    if model_type == "deepseek_v2":  # transformers has no default for it
        stated["num_experts_per_tok"] = 6
    if model_type.startswith("bloom"):
        stated["seq_length"] = 2048
    assert FAMILIES[model_type].read({"model_type": model_type}) == FAMILIES[model_type].read(stated)


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_every_family_loads_and_runs_in_every_format(quantize: str, tmp_path: Path) -> None:
    """In bfloat16, other norms, biases, gates and experts included; and the planned bytes are those of the weights."""
    for name in (
        SHAPES if LONG else ["gemma-3", "falcon-rw", "opt-350m", "gpt-2", "granite-moe", "llama4", "deepseek-v3"]
    ):
        folder = save_model(tmp_path / name, SHAPES[name])
        stages: list[Any] = []
        engine = EngineLoop.load(EngineConfig(str(folder), dtype="bfloat16", quantize=quantize), stages.append)
        row = made_prompts(1, 40, 512)[0]
        result = generate(engine, [EngineRequest(id=0, prompt_ids=row, max_new_tokens=8, ignore_eos=True)])[0]
        assert len(result.ids) == 8, (name, result.error)
        config, names = describe(folder)
        entries = read_checkpoint(folder)
        planned = planned_weight_bytes(entries, config, names, torch.bfloat16, FORMATS[quantize])
        stored = sum(entry.end - entry.start for entry in entries.values()) / 2
        assert planned <= 1.35 * stored, name
        assert engine._decoder.config.kv_elements * 2 * engine.limits.block_size == sum(
            (k[0].numel() + v[0].numel()) * 2 for k, v in engine._cache
        )


def test_a_checkpoint_of_the_bare_model_loads(tmp_path: Path) -> None:
    """The GPT-2 of the hub has no `transformer.` before its names, and masks among its tensors."""
    folder = save_model(tmp_path, SHAPES["gpt-2"])
    rows = made_prompts(2, 40, 512)
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 512, 512)
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    assert compare(folder, rows, 16).exact


@pytest.mark.parametrize(
    ("dim", "rotary_dim", "neighbours", "expected"),
    [
        (8, None, False, None),
        (8, 0, False, None),
        (8, None, True, [0, 2, 4, 6, 1, 3, 5, 7]),
        (8, 4, False, [0, 1, 4, 5, 2, 3, 6, 7]),
        (8, 4, True, [0, 2, 4, 5, 1, 3, 6, 7]),
        (6, -2, True, [4, 0, 1, 5, 2, 3]),
        (5, 2, False, [0, 2, 3, 1, 4, -1]),
        (5, 0, False, [0, 1, 2, 3, 4, -1]),
        (4, -2, False, [2, 0, 1, 3, -1, -1]),
    ],
)
def test_heads_are_arranged_in_halves(dim: int, rotary_dim: int, neighbours: bool, expected: list[int] | None) -> None:
    assert arrangement(dim, rotary_dim, neighbours, None if expected is None else len(expected)) == expected


def test_the_documented_table_is_true() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "families.md"
    assert page.read_text(encoding="utf-8") == families_table()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "snake"}, "unsupported activation"),
        ({"num_key_value_heads": 3}, "multiple of the number of kv heads"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope scaling 'spiral'"),
        ({"hidden_size": "wide"}, "`hidden_size` must be a positive integer"),
        ({"head_dim": 15}, "cannot be rotated"),
        ({"model_type": "mixtral", "num_local_experts": 1}, "cannot go to 2 of 1 experts"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "an entry for each of the 3 layers"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "makes embeddings, not text"),
        ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "must be a list of 8 numbers"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES["llama"], **change}))
    with pytest.raises(ModelError, match=words):
        describe(tmp_path)


# A family as docs/how-to/add-a-model-family.md makes one, all of it here: Nemotron, which no file of the package knows.
NEMOTRON = {
    "vocab_size": 256000,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 32,
    "num_attention_heads": 48,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "norm_eps": 1e-5,
}


def read_nemotron(raw: Mapping[str, Any]) -> tuple[DecoderConfig, WeightMap]:
    """The description of a Nemotron decoder from its config.json."""
    c = ConfigReader(raw, NEMOTRON)
    head_dim = c.integer("head_dim", c.integer("hidden_size") // c.integer("num_attention_heads"))
    biased, mlp_biased = c.flag("attention_bias"), c.flag("mlp_bias")
    config = c.decoder(
        "nemotron",
        norm=NormConfig("layer", c.number("norm_eps"), bias=True, offset=1.0),
        rope=c.rope(head_dim, partial=0.5),
        qkv_bias=biased,
        out_bias=biased,
        gated=False,
        mlp_bias=mlp_biased,
    )
    return config, WeightMap()


def test_a_family_is_added_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for seed in range(3):
        options = {
            "model_type": "nemotron",
            **TOKENS,
            "vocab_size": 512,
            "hidden_size": 96,
            "intermediate_size": 100,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": rng.choice([1, 2, 6]),
            "max_position_embeddings": 512,
            "attention_bias": seed == 1,
            "mlp_bias": seed == 2,
        }
        folder = save_model(tmp_path / str(seed), options, seed)
        with pytest.raises(ModelError, match="unsupported architecture"):
            describe(folder)
        with monkeypatch.context() as patch:
            patch.setitem(FAMILIES, "nemotron", Family("Nemotron 3, 4", read_nemotron))
            assert compare(folder, made_prompts(3, 60, 512), 24).exact
