"""What the engine refuses, before it loads and per request, and what it survives."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file, save_file

from penstock.engine.config import EngineConfig
from penstock.engine.limits import Limits, validate
from penstock.engine.loop import EngineLoop
from penstock.engine.request import Embed, EngineRequest, Grammar, Sampling
from penstock.errors import InvalidRequest, ModelError, ResourceError, UsageError
from penstock.plan.memory import Footprint, human, plan_kv
from tests.checkpoints import save_tiny
from tests.engine.driver import generate

LIMITS = Limits(
    max_input_tokens=90,
    max_total_tokens=100,
    vocab_size=512,
    eos_ids=[1],
    block_size=16,
    num_blocks=64,
    max_batch_prefill_tokens=2048,
    max_batch_size=8,
    dtype="float32",
)

NOT_NUMBERS = ("do_sample", "watermark", "logit_bias")
NUMBERS: list[Any] = [float("nan"), float("inf"), float("-inf"), -1, 0, 1e308, 2**31, 2**63, 2**70, 10**400]


@pytest.mark.parametrize("field", [f for f in Sampling.__struct_fields__ if f not in NOT_NUMBERS])
@pytest.mark.parametrize("value", NUMBERS)
def test_no_number_passes_that_the_sampler_cannot_take(field: str, value: Any) -> None:
    s = Sampling(**{field: value})
    text = refusal(EngineRequest(1, [1], 1, s))
    if text is not None:
        assert field in text
        return
    assert all(math.isfinite(v) for v in msgspec.structs.astuple(s) if isinstance(v, float))
    assert s.temperature > 0
    assert 0 < s.top_p <= 1
    assert 0 <= s.top_k < 2**31


def refusal(request: EngineRequest) -> str | None:
    try:
        validate(request, LIMITS)
    except InvalidRequest as error:
        return error.what
    return None


@pytest.mark.parametrize(
    ("prompt", "new", "text"),
    [
        ([], 1, "cannot be empty"),
        ([1] * 90, 11, "`inputs` tokens + `max_new_tokens` must be <= 100. Given: 90 `inputs` tokens and 11"),
        ([1] * 91, 1, "must have less than 90 tokens. Given: 91"),
        ([1], 0, "`max_new_tokens` must be strictly positive"),
        ([1], -5, "`max_new_tokens` must be strictly positive"),
        ([1, 512], 1, "token id 512 is outside"),
        ([-1], 1, "token id -1 is outside"),
        ([2**40], 1, "is outside"),
    ],
)
def test_prompts_and_lengths(prompt: list[int], new: int, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        validate(EngineRequest(1, prompt, new), LIMITS)
    assert text in caught.value.what


@pytest.mark.parametrize("value", NUMBERS)
def test_no_bias_passes_that_the_sampler_cannot_take(value: Any) -> None:
    """As a value, and where it is whole as an id."""
    text = refusal(EngineRequest(1, [1], 1, Sampling(logit_bias={3: value})))
    assert (text is None) == (value in (-1, 0))
    if isinstance(value, int):
        text = refusal(EngineRequest(1, [1], 1, Sampling(logit_bias={value: 1.0})))
        assert (text is None) == (value == 0)
        assert text is None or "`logit_bias`" in text


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("min_new_tokens", -1, "`min_new_tokens`"),
        ("min_new_tokens", 6, "`min_new_tokens` must be >= 0 and <= `max_new_tokens`"),
        ("min_new_tokens", 10**400, "`min_new_tokens`"),
        ("prompt_top_n", 1, "`prompt_top_n` needs `prompt_logprobs`"),
        ("prompt_top_n", 129, "`prompt_top_n` must be >= 0 and <= 128"),
        ("top_n_tokens", -1, "`top_n_tokens` must be >= 0 and <= 128"),
        ("stop_ids", [512], "`stop_ids`: token id 512 is outside"),
        ("stop_ids", [3, -1], "`stop_ids`: token id -1 is outside"),
        ("stop_ids", [1] * 257, "`stop_ids` must have at most 256"),
        ("grammar", Grammar("x" * (2**20 + 1)), "`grammar` must be at most"),
        ("max_new_tokens", 0, "`max_new_tokens` must be strictly positive"),
        ("priority", 2**31, "`priority`"),
    ],
)
def test_fields_out_of_bounds(field: str, value: Any, text: str) -> None:
    request = msgspec.structs.replace(EngineRequest(1, [1], 5), **{field: value})
    assert text in (refusal(request) or "")


def test_many_biases_and_long_lists_of_alternatives() -> None:
    assert refusal(EngineRequest(1, [1], 1, Sampling(logit_bias=dict.fromkeys(range(512), 100)))) is None
    wide = msgspec.structs.replace(LIMITS, vocab_size=5000, max_input_tokens=2**20, max_total_tokens=2**21)
    with pytest.raises(InvalidRequest, match="at most 1024 entries"):
        validate(EngineRequest(1, [1], 1, Sampling(logit_bias=dict.fromkeys(range(1025), 1.0))), wide)
    validate(EngineRequest(1, [1] * 8192, 1, prompt_logprobs=True, prompt_top_n=128), wide)
    with pytest.raises(InvalidRequest, match="times the tokens"):
        validate(EngineRequest(1, [1] * 8193, 1, prompt_logprobs=True, prompt_top_n=128), wide)


def test_nothing_to_generate_is_fine_where_the_prompt_is_asked_about() -> None:
    assert refusal(EngineRequest(1, [1], 0, prompt_logprobs=True)) is None
    assert refusal(EngineRequest(1, [1], 0, embed=Embed())) is None
    assert "strictly positive" in (refusal(EngineRequest(1, [1], -1, embed=Embed())) or "")


def test_the_edges_are_allowed(tiny_llama: Path) -> None:
    validate(EngineRequest(1, [511] * 90, 10), LIMITS)
    engine = EngineLoop.load(EngineConfig(str(tiny_llama), max_total_tokens=40, max_batch_total_tokens=48))
    full = EngineRequest(1, [511] * 39, 1, ignore_eos=True)
    long = EngineRequest(2, [7], 39, ignore_eos=True)
    results = generate(engine, [full, long])
    assert len(results[1].ids) == 1
    assert len(results[2].ids) == 39
    assert results[2].finish == "length"


def test_too_little_memory_is_refused_before_loading(tiny_llama: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        EngineLoop.load(EngineConfig(str(tiny_llama), max_batch_total_tokens=2**40))
    text = str(caught.value)
    assert "need" in text
    assert "have" in text
    assert sum(flag in text for flag in ("--max-total-tokens", "--max-batch-total-tokens", "--dtype")) == 3


def test_an_address_space_limit_counts(tiny_llama: Path) -> None:
    """ulimit -v below what the KV cache would take: a clear refusal in place of a crash."""
    program = (
        "import resource, sys\n"
        "import torch\n"
        "from penstock.engine.config import EngineConfig\n"
        "from penstock.engine.loop import EngineLoop\n"
        "from penstock.errors import ResourceError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "try:\n"
        "    EngineLoop.load(EngineConfig(sys.argv[1], max_batch_total_tokens=2**21))\n"
        "except ResourceError as error:\n"
        "    print('refused:', error.what)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tiny_llama)], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("refused: too little memory"), done.stderr[-500:]


def test_the_plan_adds_up() -> None:
    footprint = Footprint(weights=1000, kv_per_token=10, step=500)
    plan = plan_kv(footprint, 100_000, 0.9, 16, 64, None, 8)
    assert plan.num_blocks == 8 * 4
    assert plan.kv_bytes == 8 * 4 * 160
    small = plan_kv(footprint, 10_000, 0.9, 16, 64, None, 8)
    assert small.num_blocks * 160 <= 10_000 * 0.9 / 4
    with pytest.raises(ResourceError, match="holds less than one sequence"):
        plan_kv(footprint, 100_000, 0.9, 16, 64, 32, 8)
    assert human(3.1 * 2**30) == "3.1 GiB"
    assert human(512 * 2**20) == "512 MiB"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_total_tokens": 10_000}, "beyond the model's 512 positions"),
        ({"max_input_tokens": 2_000}, "beyond the model's 512 positions"),
        ({"rope_scaling": "linear", "rope_factor": float("nan")}, "rope-factor"),
        ({"memory_fraction": float("nan")}, "fraction"),
        ({"max_input_tokens": 60, "max_total_tokens": 50}, "must be <"),
        ({"dtype": "int3"}, "unknown dtype"),
        ({"rope_scaling": "cubic", "rope_factor": 2.0}, "unknown rope scaling"),
    ],
)
def test_options_that_cannot_be(tiny_llama: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        EngineLoop.load(EngineConfig(str(tiny_llama), **options))


def test_damaged_weights_fail_the_request_not_the_engine(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][77] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = EngineLoop.load(EngineConfig(str(folder)))
    results = generate(
        engine,
        [EngineRequest(1, [5, 77], 4, ignore_eos=True), EngineRequest(2, [5, 6], 4, ignore_eos=True)],
    )
    assert results[1].finish == "error"
    assert "not numbers" in (results[1].error or "")
    assert results[2].finish == "length"
    assert engine.stats.used_blocks == 0


def test_damaged_numbers_stay_in_their_blocks(tmp_path: Path) -> None:
    """What a broken sequence left in the cache reaches nobody, beside it or after it."""
    folder = save_tiny(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][77] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = EngineLoop.load(EngineConfig(str(folder), max_total_tokens=64, max_batch_total_tokens=256))
    healthy = EngineRequest(0, [5, 6, 7], 20, ignore_eos=True)
    expected = generate(engine, [healthy])[0].ids
    for round_number in range(3):
        bad = [EngineRequest(i, [77] * (10 + i) + [round_number], 4) for i in range(1, 12)]
        results = generate(engine, [*bad, healthy])
        assert all(results[i].finish == "error" for i in range(1, 12))
        assert results[0].ids == expected
    longer = [EngineRequest(i, [5] * (7 * i), 8, ignore_eos=True) for i in range(1, 6)]
    assert all(r.finish == "length" for r in generate(engine, longer).values())


def test_a_model_that_cannot_compute_is_refused_at_the_start(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="does not compute"):
        EngineLoop.load(EngineConfig(str(folder)))


def test_config_and_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    removed = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"no tensor 'model\.norm\.weight'"):
        EngineLoop.load(EngineConfig(str(folder)))
    weights["model.norm.weight"] = removed[:5].clone()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match="has shape"):
        EngineLoop.load(EngineConfig(str(folder)))


def test_a_failing_step_ends_its_batch_and_nothing_else(tiny_llama: Path) -> None:
    """Break a layer under the engine's feet, as a device fault would, then mend it."""
    engine = EngineLoop.load(EngineConfig(str(tiny_llama)))
    layers = engine._decoder._layers
    sound = layers[1]
    layers[1] = None  # type: ignore[call-overload]
    results = generate(engine, [EngineRequest(1, [5, 6], 4), EngineRequest(2, [7], 4)])
    assert {r.finish for r in results.values()} == {"error"}
    assert engine.stats.used_blocks == 0
    layers[1] = sound
    assert generate(engine, [EngineRequest(3, [5, 6], 4, ignore_eos=True)])[3].finish == "length"
    layers[1] = None  # type: ignore[call-overload]
    for i in (10, 11):
        generate(engine, [EngineRequest(i, [5], 2)])
    with pytest.raises(RuntimeError, match="in a row"):
        generate(engine, [EngineRequest(12, [5], 2)])
