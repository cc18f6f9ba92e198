"""What fits where, and how fast: against sums done by hand and against published measurements."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.engine.kv_type import kv_bytes as engine_bytes
from penstock.errors import UsageError
from penstock.hub.config import read_config
from penstock.models.families import describe
from penstock.plan.fit import best_plan, plan_on
from penstock.plan.hardware import GIB, cpu_node, gpu, known_gpus
from penstock.plan.known import find_known, known_models, published
from penstock.plan.roofline import step_seconds, tokens_per_second
from penstock.plan.sbatch import flags, places
from penstock.plan.shape import Shape
from penstock.plan.shapes import shape_of
from penstock.plan.site import load_site
from penstock.plan.table import CARDS, MODELS, markdown, rows
from penstock.plan.weights import kv_bytes, kv_bytes_per_token, read_bytes, stored_format, weight_bytes

GENERIC = "generic"


def shape(name: str) -> Shape:
    return shape_of(known_models()[name].config)


@pytest.mark.parametrize("name", list(known_models()))
def test_known_models_have_their_published_sizes(name: str) -> None:
    known = known_models()[name]
    assert shape_of(known.config).parameters / 1e9 == pytest.approx(known.parameters, rel=0.001)


def test_names_of_known_models() -> None:
    for name in ("llama-3-8b", "LLAMA-3-8B", "meta-llama/Meta-Llama-3-8B-Instruct", "Meta-Llama-3-8B"):
        found = find_known(name)
        assert found is not None
        assert found[0] == "llama-3-8b"
    assert find_known("no-such-model") is None


def test_bytes_of_formats() -> None:
    """Llama 2 7B: 6.74e9 weights, of which 131e6 are the embedding and 131e6 the head."""
    llama = shape("llama-2-7b-chat")
    assert weight_bytes(llama, "float16") == llama.parameters * 2
    assert weight_bytes(llama, "float32") == llama.parameters * 4
    assert weight_bytes(llama, "gptq") == pytest.approx(3.9e9, rel=0.02)  # the published file: 3.90 GB
    assert weight_bytes(llama, "q4_k_m") == pytest.approx(4.08e9, rel=0.02)  # 4.08 GB
    assert weight_bytes(llama, "q8_0") == pytest.approx(7.16e9, rel=0.02)  # 7.16 GB
    assert kv_bytes(llama, "float16", 1) == 2 * 32 * 4096 * 2


def test_a_cache_of_bytes_is_counted_as_the_engine_keeps_it(tiny_llama: Path) -> None:
    """Scales and all; a windowed model's cache too, and nearly twice the sequences fit."""
    described, _ = describe(tiny_llama)
    planned = shape_of(read_config(tiny_llama))
    for name, dtype in (("int8", torch.int8), (None, torch.float32), ("fp8_e4m3fn", torch.float8_e4m3fn)):
        assert kv_bytes_per_token(replace(planned, kv_dtype=name), "float32") == engine_bytes(described, dtype)
    node = cpu_node(16, 32 * GIB)
    llama = shape("llama-3-8b")
    plain, small = (plan_on(replace(llama, kv_dtype=k), "bfloat16", node, 1, 4096, 1e9) for k in (None, "int8"))
    assert small.kv_token == 32 * 2 * 8 * (128 + 4) == plain.kv_token * 132 // 256
    assert 1.9 * plain.sequences < small.sequences < 2 * plain.sequences
    assert small.weights == plain.weights


@pytest.mark.parametrize(
    ("config", "form"),
    [
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "torch.bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16", "quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "nf4"),
        ({"text_config": {"dtype": "float32"}}, "float32"),
        ({}, "bfloat16"),
    ],
)
def test_the_format_of_a_checkpoint(config: dict[str, object], form: str) -> None:
    assert stored_format(config) == form


@pytest.mark.parametrize(
    ("model", "card", "cards"),
    [  # the configurations that the guides confirm, and what is larger than they have
        ("llama-2-70b-chat", "a100-80", 2),
        ("llama-2-13b-chat", "a100-80", 1),
        ("llama-2-7b-chat", "a100-80:3g.40gb", 1),
        ("falcon-40b", "a100-80", 2),
        ("falcon-7b", "a100-80:3g.40gb", 1),
        ("flan-t5-xxl", "a100-80", 1),
        ("mistral-7b", "v100-32", 1),
        ("bloomz", "a100-80", 8),
        ("bloom-176b", "mi300x", 2),
        ("llama-3-70b", "h200", 2),
        ("llama-3-70b", "mi300x", 1),
    ],
)
def test_the_fewest_cards_that_hold_a_model(model: str, card: str, cards: int) -> None:
    known = known_models()[model]
    plan = best_plan(shape(model), stored_format(known.config), gpu(card), 2048, 1e9, None)
    assert plan.fits
    assert plan.cards == cards
    assert plan.weights == weight_bytes(shape(model), plan.form) >= shape(model).parameters * 2


def test_what_does_not_fit_is_compressed_or_refused() -> None:
    small = gpu("v100-16")
    for model, form in (("llama-3-8b", "int8"), ("llama-2-13b-chat", "int4")):
        plan = best_plan(shape(model), "bfloat16", small, 2048, 1e9, 1)
        assert plan.fits
        assert plan.form == form
    hopeless = best_plan(shape("llama-2-70b-chat"), "float16", small, 2048, 1e9, 1)
    assert not hopeless.fits
    assert hopeless.form == "float16"
    assert hopeless.need > hopeless.have


def test_sequences_are_what_the_memory_holds() -> None:
    """By hand: (79.2 - 1.5) GiB x 0.9 - weights - a step, over the cache of one sequence."""
    llama = shape("llama-3-8b")
    plan = plan_on(llama, "bfloat16", gpu("a100-80"), 1, 4096, 1e9)
    room = (79.2 - 1.5) * GIB * 0.9 - llama.parameters * 2 - plan.activations
    assert plan.sequences == int(room // (4096 * 131072))
    longer = plan_on(llama, "bfloat16", gpu("a100-80"), 1, 8192, 1e9)
    assert longer.sequences < plan.sequences / 1.9


def test_a_step_reads_weights_once_and_every_cache() -> None:
    llama, card = shape("llama-3-8b"), gpu("h100-80")
    one, many = (step_seconds(llama, "bfloat16", card, 1, batch, 2048) for batch in (1, 64))
    assert one < many < 3 * one
    assert step_seconds(llama, "int4", card, 1, 1, 2048) < one
    assert step_seconds(llama, "bfloat16", card, 4, 1, 2048) < one


def test_experts_are_read_as_they_are_chosen() -> None:
    mixtral = shape("mixtral-8x7b")
    one, many = read_bytes(mixtral, "bfloat16", 1), read_bytes(mixtral, "bfloat16", 100)
    assert one == pytest.approx(2 * (mixtral.active + mixtral.head))
    assert many == pytest.approx(2 * (mixtral.matrices + mixtral.head), rel=1e-6)


def test_predictions_beside_published_measurements() -> None:
    """Single streams within a quarter; the median of all, older engines and large batches included, as well."""
    errors = {}
    for m in published():
        predicted = tokens_per_second(shape(m.model), m.format, gpu(m.gpu), m.cards, m.batch, m.context)
        errors[m] = abs(predicted / m.tokens_per_second - 1)
    assert sorted(errors.values())[len(errors) // 2] < 0.25
    single = [error for m, error in errors.items() if m.batch == 1 and m.format in ("bfloat16", "float16")]
    assert sum(error < 0.25 for error in single) >= len(single) - 1


def test_no_prediction_beats_the_bandwidth() -> None:
    for name in known_gpus():
        card = gpu(name)
        fastest = card.bandwidth / read_bytes(shape("llama-3-8b"), "bfloat16", 1)
        assert tokens_per_second(shape("llama-3-8b"), "bfloat16", card, 1, 1, 1) < fastest


@pytest.mark.parametrize("name", ["a99", "a100-80:9g.1gb", "v100-32:1g"])
def test_unknown_cards(name: str) -> None:
    with pytest.raises(UsageError):
        gpu(name)


def test_sbatch_options_of_a_site() -> None:
    mila = load_site("mila")
    place = next(p for p in places(mila, "long") if p.device.name == "a100-80")
    plan = plan_on(shape("llama-2-70b-chat"), "float16", place.device, 2, 2048, 1e9)
    options = flags(plan, mila, place, "12:00:00")
    assert "--partition=long" in options
    assert "--gres=gpu:a100l:2" in options
    assert "--time=12:00:00" in options
    memory = int(next(o for o in options if o.startswith("--mem="))[6:-1])
    assert 129 <= memory <= 1007 // 2
    narval = load_site("narval")
    slice_ = next(p for p in places(narval) if p.device.name == "a100-40:3g.20gb")
    small = flags(plan_on(shape("llama-3.2-1b"), "bfloat16", slice_.device, 1, 2048, 1e9), narval, slice_)
    assert "--gpus-per-node=a100_3g.20gb:1" in small
    assert "--account=ACCOUNT" in small
    assert not any(o.startswith("--partition") for o in small)


def test_a_limited_partition_limits_what_is_asked() -> None:
    mila = load_site("mila")
    place = next(p for p in places(mila, "unkillable") if p.device.name == "a100-80")
    assert place.max_cards == 1
    options = flags(plan_on(shape("llama-2-13b-chat"), "float16", place.device, 1, 2048, 1e9), mila, place)
    assert "--mem=32G" in options
    assert "--cpus-per-task=6" in options


def test_a_node_without_cards() -> None:
    node = cpu_node(64, 256 * GIB)
    assert best_plan(shape("llama-2-7b-chat"), "float16", node, 2048, 1e9, None).form == "bfloat16"
    assert not best_plan(shape("bloomz"), "bfloat16", cpu_node(8, 32 * GIB), 2048, 1e9, None).fits


def test_the_table_has_every_model_on_everything() -> None:
    table = list(rows(load_site(GENERIC), []))
    assert {row.model for row in table} == set(MODELS)
    for model in MODELS:
        names = {row.plan.device.name for row in table if row.model == model}
        assert set(CARDS) <= names
        assert any(name.startswith("cpu") for name in names)
    slices = {row.model: row.plan.device.name for row in table if ":" in row.plan.device.name}
    assert slices["llama-2-7b-chat"] == "a100-80:1g.20gb"
    assert "llama-2-70b-chat" not in slices
    text = markdown(table)
    assert text.count("### ") == len(MODELS)
    assert "`--nodes=1 --ntasks=1 --gres=gpu:a100:2" in text
