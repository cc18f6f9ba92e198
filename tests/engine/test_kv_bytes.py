"""A KV cache of signed bytes (--kv-cache-dtype int8): half the memory, nearly the same scores, whoever uses it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from penstock.devices import cuda
from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest
from penstock.errors import UsageError
from penstock.kernels import native
from penstock.plan.memory import GIB
from tests.checkpoints import save_model
from tests.encoder_decoders import SHAPES as ENCODERS
from tests.encoder_decoders import save_encoder_decoder
from tests.engine.driver import Generated, generate, started
from tests.engine.exactness import made_prompts
from tests.families import SHAPES
from tests.others import OTHERS

ROWS = made_prompts(3, 70, 512)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def answers(engine: EngineLoop, rows: list[list[int]] = ROWS, new: int = 16) -> dict[int, Generated]:
    return generate(engine, [EngineRequest(i, row, new, logprobs=True, ignore_eos=True) for i, row in enumerate(rows)])


def apart(some: dict[int, Generated], others: dict[int, Generated]) -> float:
    """The largest difference of log-probabilities up to the first token that is not the same, that one left out."""
    most = 0.0
    for i, one in some.items():
        other = others[i]
        assert one.error is None
        assert other.error is None
        same = next((j for j, pair in enumerate(zip(one.ids, other.ids, strict=True)) if pair[0] != pair[1]), None)
        end = len(one.ids) if same is None else same
        if end:
            most = max(most, float(np.abs(np.subtract(one.logprobs[:end], other.logprobs[:end])).max()))  # type: ignore[arg-type]
    return most


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma-2", "falcon-rw", "deepseek-v2-lite", "t5", "exaone4", "minicpm3"]
)
def test_scores_are_nearly_the_same(name: str, tmp_path: Path) -> None:
    """Grouped heads, a window, a softcap, ALiBi, latent attention, an encoder, attention of transformers."""
    if name == "t5":
        folder = save_encoder_decoder(tmp_path, ENCODERS[name])
    else:
        folder = save_model(tmp_path, OTHERS[name] if name in OTHERS else SHAPES[name])
    options = {"max_batch_prefill_tokens": 48, "max_total_tokens": 128}
    whole, _ = started(folder, **options)
    small, stages = started(folder, kv_cache_dtype="int8", **options)
    assert "in int8 with a scale for each token and head (--kv-cache-dtype)" in stages["KV memory"]
    assert all(x.dtype == torch.int8 for layer in small._cache for x in layer)
    difference = apart(answers(whole), answers(small))
    assert 0 < difference < 0.1


def test_bytes_are_counted_with_their_scales(tiny_llama: Path) -> None:
    """The memory that is planned is the memory that the cache takes, and holds more tokens."""
    tokens = []
    for kv_cache_dtype in (None, "int8"):
        engine, _ = started(tiny_llama, dtype="bfloat16", kv_cache_dtype=kv_cache_dtype, kv_cache_gib=0.01)
        held = sum(x.nbytes for layer in engine._cache for x in layer)
        assert 0.98 * 0.01 * GIB < held <= 0.01 * GIB
        config = engine._decoder.config  # type: ignore[attr-defined]
        scored = engine.cost.step([(1, 40)], 1).kv_bytes - engine.cost.step([(1, 39)], 1).kv_bytes
        assert scored * engine.limits.num_blocks * engine.limits.block_size == pytest.approx(held)
        tokens.append(engine.limits.num_blocks)
    width = config.head_width
    assert tokens[1] / tokens[0] == pytest.approx(2 * width / (width + 4), rel=0.01)


def test_the_schedule_changes_nothing(tiny_llama: Path) -> None:
    """Alone or together, in chunks, preempted, with a cached prefix: nearly the same scores each time."""
    rows = [*ROWS, [*ROWS[0][:40], 7, 8, 9]]
    alone, _ = started(tiny_llama, kv_cache_dtype="int8", max_batch_size=1)
    expected = answers(alone, rows, 30)
    tight = {"block_size": 4, "max_batch_total_tokens": 160, "max_total_tokens": 120}
    engine, _ = started(tiny_llama, kv_cache_dtype="int8", max_batch_prefill_tokens=13, **tight)
    for _again in range(2):
        # a number between two bytes may fall on either side, so not as near as without rounding
        assert apart(answers(engine, rows, 30), expected) < 0.01
    assert engine.stats.preemptions > 0
    assert engine.stats.cached_prompt_tokens > 0
    assert engine.stats.used_blocks == 0


def test_without_compiled_kernels(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, _ = started(tiny_llama, kv_cache_dtype="int8")
    expected = answers(compiled)
    monkeypatch.setattr(native, "can_attend", lambda *_: False)
    monkeypatch.setattr(native, "can_rotate", lambda *_: False)
    plain, _ = started(tiny_llama, kv_cache_dtype="int8")
    assert apart(answers(plain), expected) < 0.02


def test_what_has_no_such_cache_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "mamba", OTHERS["mamba"])
    with pytest.raises(UsageError, match="int8: this model keeps a memory of its own"):
        started(folder, kv_cache_dtype="int8")
    monkeypatch.setattr(cuda, "cards", lambda: [cuda.Card(0, "A card", GIB, "9.0", "CUDA 13.0")])
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UsageError, match="an int8 KV cache is for processors"):
        EngineLoop.load(EngineConfig(str(tmp_path), kv_cache_dtype="int8"))


def test_one_for_gpus_has_no_effect_and_says_so(tiny_llama: Path) -> None:
    engine, stages = started(tiny_llama, kv_cache_dtype="fp8_e5m2")
    assert "fp8_e5m2 is for GPUs and has no effect, int8 takes as few bytes here" in stages["KV memory"]
    assert engine._cache[0][0].dtype == torch.float32
