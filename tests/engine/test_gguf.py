"""GGUF files run like the checkpoints that they were made of: same text, same tokens, same configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest
from penstock.hub.snapshot import resolve
from penstock.hub.weights import read_weights
from penstock.kernels.gguf_blocks import BLOCKS, dequantize
from penstock.models.tensors import TensorReader
from tests.checkpoints import ROPES, save_tiny
from tests.engine.driver import generate
from tests.families import SHAPES
from tests.hub.gguf_files import KINDS, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))


def greedy(folder: Path, dtype: str = "float32", **options: Any) -> list[list[int]]:
    engine = EngineLoop.load(EngineConfig(str(folder), dtype=dtype, **options))
    rng = np.random.default_rng(5)
    prompts = [rng.integers(5, 512, n).tolist() for n in (1, 7, 40, 90)]
    requests = [EngineRequest(i, ids, 48, ignore_eos=True) for i, ids in enumerate(prompts, 1)]
    found = generate(engine, requests)
    assert all(result.error is None for result in found.values())
    return [found[i].ids for i in sorted(found)]


@pytest.mark.parametrize("kind", sorted(BLOCKS))
def test_dequantization_is_the_reference_bit_for_bit(kind: str) -> None:
    """On random bytes (every pattern of scales and numbers) and on what the reference makes of random weights."""
    rng = np.random.default_rng(1)
    elements, size = BLOCKS[kind]
    blocks = rng.integers(0, 256, (500, size), dtype=np.uint8)
    for at in {"Q6_K": (208,), "Q8_0": (0,), "Q4_0": (0,), "Q5_0": (0,)}.get(kind, (0, 2)):
        blocks[:, at : at + 2] = rng.normal(0, 3, (500, 1)).astype(np.float16).view(np.uint8)
    made = [blocks]
    try:
        weights = rng.normal(0, 0.1, (40, elements * 3)).astype(np.float32)
        made.append(gguf.quants.quantize(weights, KINDS[kind]).reshape(-1, size))
    except NotImplementedError:  # the package quantizes the K types nowhere
        pass
    for raw in made:
        truth = gguf.quants.dequantize(raw, KINDS[kind])
        ours = dequantize(kind, torch.from_numpy(raw)).numpy()
        assert np.array_equal(ours.view(np.uint32), truth.view(np.uint32))


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "mistral", "qwen2", "qwen3"])
def test_text_is_that_of_the_checkpoint(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path / "original", family)
    file = write_gguf(folder, tmp_path / f"{family}.gguf")
    found = resolve(str(file))
    assert greedy(found.path) == greedy(folder)


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3"])
def test_rope_scaling_survives(tmp_path: Path, rope: str) -> None:
    scaling = {"rope_theta": 10000.0, **ROPES[rope]}
    folder = save_tiny(tmp_path / "original", "llama", rope_parameters=scaling, head_dim=32)
    file = write_gguf(folder, tmp_path / "scaled.gguf")
    assert greedy(resolve(str(file)).path) == greedy(folder)


GEMMAS = {
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": 24,
        "num_hidden_layers": 6,
    },
}


@pytest.mark.parametrize("family", GEMMAS)
def test_gemma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Tensors, configuration and text are the checkpoint's."""
    from transformers import AutoConfig

    monkeypatch.setitem(SHAPES, family, {**SHAPES["llama"], **GEMMAS[family]})
    folder = save_tiny(tmp_path / "original", family, tie_word_embeddings=True)
    path = resolve(str(write_gguf(folder, tmp_path / "gemma.gguf"))).path
    tensors = load_file(folder / "model.safetensors")
    entries = read_weights(path)
    read = TensorReader(entries, torch.float32)
    assert entries.keys() == tensors.keys() - {"lm_head.weight"}
    for name, entry in entries.items():
        assert torch.allclose(read(name, entry.shape), tensors[name], atol=1e-6, rtol=0)
    ours, truth = AutoConfig.from_pretrained(path), AutoConfig.from_pretrained(folder)
    for key in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
        "intermediate_size", "vocab_size", "query_pre_attn_scalar", "sliding_window", "layer_types",
        "attn_logit_softcapping", "final_logit_softcapping", "rope_parameters", "tie_word_embeddings",
    ):  # fmt: skip
        theirs = getattr(truth, key, None)
        assert getattr(ours, key, None) == (pytest.approx(theirs) if isinstance(theirs, float) else theirs), key
    assert greedy(path) == greedy(folder)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_kind_of_file_runs(tmp_path: Path, kind: str) -> None:
    """Quantized matrices equal the reference's; what follows is the same decoder."""
    folder = save_tiny(tmp_path / "original", "llama")
    file = write_gguf(folder, tmp_path / "model.gguf", kind)
    path = resolve(str(file)).path
    read = TensorReader(read_weights(path), torch.float32)
    weights = load_file(folder / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    truth = gguf.quants.dequantize(gguf.quants.quantize(weights.numpy(), KINDS[kind]), KINDS[kind])
    ours = read("model.layers.1.mlp.down_proj.weight", tuple(weights.shape))
    assert np.array_equal(ours.numpy(), truth)
    assert len(greedy(path)[0]) == 48
    assert len(greedy(path, dtype="bfloat16", quantize="int8")[0]) == 48


def test_q4_k_fills_a_large_tensor_in_parts(tmp_path: Path) -> None:
    """More weights than are dequantized at a time, the last part shorter."""
    rng = np.random.default_rng(3)
    elements, size = BLOCKS["Q4_K"]
    rows, columns = 131, 10 * elements
    raw = rng.integers(0, 100, (rows, 10 * size), dtype=np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "large.gguf", "llama")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=KINDS["Q4_K"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from penstock.hub.gguf.file import read_gguf
    from penstock.hub.gguf.tensors import entries_of

    entries = entries_of(read_gguf(tmp_path / "large.gguf"))
    ours = TensorReader(entries, torch.float32)("model.embed_tokens.weight", (rows, columns))
    assert np.array_equal(ours.numpy(), gguf.quants.dequantize(raw, KINDS["Q4_K"]))


def test_a_model_in_parts(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "original", "llama")
    parts = tmp_path / "parts"
    parts.mkdir()
    write_gguf(folder, parts / "big.gguf", shards=10)
    files = sorted(parts.glob("*.gguf"))
    assert len(files) > 2
    whole = greedy(folder)
    assert greedy(resolve(str(files[1])).path) == whole
    assert greedy(resolve(str(parts)).path) == whole
