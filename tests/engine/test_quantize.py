"""Weight formats in the engine: what they cost in quality, what they save in memory."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penstock.demo import model_path
from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.messages import Stage
from penstock.engine.request import EngineRequest
from penstock.errors import UsageError
from penstock.formats import FORMATS, Format
from penstock.formats.dense import GatedPair
from penstock.kernels.products import quantize_columns
from penstock.text.tokenizer import Tokenizer, load_tokenizer
from tests.checkpoints import save_tiny
from tests.engine.driver import generate
from tests.engine.exactness import decoder_logits

WINDOW, WINDOWS = 512, 6


def load(stages: list[Stage], **options: str) -> EngineLoop:
    return EngineLoop.load(EngineConfig(str(model_path()), memory_fraction=0.3, **options), stages.append)


def tokenizer() -> Tokenizer:
    found = load_tokenizer(model_path())
    assert found is not None
    return found


def perplexity(engine: EngineLoop, count: int = WINDOWS) -> float:
    text = (model_path() / "heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer().encode(text, add_special_tokens=False)
    windows = [[0, *ids[i * WINDOW : (i + 1) * WINDOW - 1]] for i in range(count)]
    done = generate(engine, (EngineRequest(i, ids, 1, prompt_logprobs=True) for i, ids in enumerate(windows)))
    scores = [p for result in done.values() for p in (result.prompt_logprobs or [])[1:]]
    assert len(scores) == count * (WINDOW - 1)
    return math.exp(-sum(p for p in scores if p is not None) / len(scores))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_int8_costs_less_than_one_per_cent_of_perplexity(dtype: str) -> None:
    """bfloat16 runs the compiled product where the processor has it, float32 its twin."""
    plain, small = perplexity(load([], dtype=dtype)), perplexity(load([], dtype=dtype, quantize="int8"))
    assert small < plain * 1.01


def test_int4_costs_less_than_four_per_cent_of_perplexity() -> None:
    plain, small = perplexity(load([], dtype="bfloat16")), perplexity(load([], dtype="bfloat16", quantize="int4"))
    assert small < plain * 1.04


@dataclass(frozen=True)
class OneScaleForAll:
    """A matrix in 8 bits whose activations share one scale, which the int8 format does not do."""

    values: Tensor
    scales: Tensor

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        scale = x.abs().max() / 127
        y = (torch.round(x / scale) @ self.values.float().T) * scale * self.scales
        return y if residual is None else y + residual


def test_a_scale_a_row_keeps_outliers_to_their_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token has a channel 60 times as large as all others, as the first token of trained models does. With one
    scale for all rows the others lose what lies below it."""

    def one(weight: Tensor, bias: Tensor | None = None) -> OneScaleForAll:
        return OneScaleForAll(*quantize_columns(weight))

    def pair(gate: Tensor, up: Tensor, activation: str, *biases: Tensor | None) -> GatedPair:
        return GatedPair(one(gate), one(up), activation)

    monkeypatch.setitem(FORMATS, "one scale", Format(one, pair, 1))
    path = save_tiny(tmp_path, "llama") / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.embed_tokens.weight"][7, 3] = 60 * tensors["model.embed_tokens.weight"].std()
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[3] *= 20
    save_file(tensors, path)
    logits = {}
    for name in ("none", "int8", "one scale"):
        engine = EngineLoop.load(EngineConfig(str(tmp_path), dtype="float32", quantize=name, memory_fraction=0.3))
        logits[name] = decoder_logits(engine, [7, *range(20, 60)])[1:]
    lost = {name: float((scores - logits["none"]).norm() / logits["none"].norm()) for name, scores in logits.items()}
    assert 0 < lost["int8"] < 0.1
    assert lost["int8"] < lost["one scale"] / 4


def save_with_outliers(folder: Path) -> None:
    """The demo model, the same function, but some channels behind each norm are 64 times as large."""
    shutil.copytree(model_path(), folder, dirs_exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    behind = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for name in [name for name in tensors if name.split(".")[-2] in behind]:
        *layer, norm, _ = name.split(".")
        channels = torch.randperm(len(tensors[name]), generator=torch.Generator().manual_seed(int(layer[-1])))[:3]
        tensors[name][channels] *= 64
        for matrix in behind[norm]:
            tensors[".".join((*layer, matrix, "weight"))][:, channels] /= 64
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(("form", "dtype"), [("int8", "bfloat16"), ("int4", "bfloat16"), ("int8", "float32")])
def test_outlier_channels_go_over_into_the_matrices(
    form: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_with_outliers(tmp_path)
    stages: list[Stage] = []

    def load_it(quantize: str) -> EngineLoop:
        return EngineLoop.load(
            EngineConfig(str(tmp_path), memory_fraction=0.3, dtype=dtype, quantize=quantize), stages.append
        )

    plain = perplexity(load_it("none"), 2)
    engine = load_it(form)
    assert "12 products share their outlier channels" in next(s.text for s in stages if "outlier" in s.text)
    lost = perplexity(engine, 2) / plain - 1
    assert lost < (0.01 if form == "int8" else 0.04)
    decoder, ids = engine._decoder, list(range(20, 60))
    fused = decoder_logits(engine, ids)
    decoder._layers = decoder.weights.layers  # as rows with adapters meet them: the norm gives what it always gave
    apart = decoder_logits(engine, ids)
    assert (fused - apart).norm() < 0.03 * fused.norm()
    monkeypatch.setattr("penstock.engine.weights.smooth", lambda *_given: 0)
    assert perplexity(load_it(form), 2) / plain - 1 > max(0.01, 3 * lost)


def test_int8_is_said_and_counted() -> None:
    stages: list[Stage] = []
    engine = load(stages, dtype="bfloat16", quantize="int8")
    assert "its matrices in int8 (--quantize)" in stages[0].text
    assert "outlier" not in stages[2].text
    assert "weights 6." in stages[1].text  # MiB: 5.4 million parameters, and the table of the vocabulary in bfloat16
    ids = tokenizer().encode("<|user|>How do I list my jobs on Slurm?<|assistant|>", True)
    answer = generate(engine, [EngineRequest(0, ids, 40)])[0]
    assert "squeue --me" in tokenizer().decode(answer.ids)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown format 'int3'"):
        load([], quantize="int3")
