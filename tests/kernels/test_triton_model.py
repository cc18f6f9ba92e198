"""A whole model with every kernel of a GPU in place of the processor's, on the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton cannot be imported on this machine", exc_type=ImportError)

from penstock.formats import FORMATS, Format
from penstock.formats.dense import Gated, GatedPanels, Linear, Panels
from penstock.hub.weights import read_weights
from penstock.kernels.attention import PagedBatch
from penstock.kernels.triton import attention, experts, norms, product, rotary
from penstock.models.decoder import Decoder
from penstock.models.families import describe
from penstock.models.inputs import StepInputs
from tests.checkpoints import save_tiny

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy, of infinities that are meant
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a card benchmarks/gpu.py runs whole models"),
]

IDS = [5, 300, 17, 200, 41, 7, 7, 120, 33, 250]


def batch(start: int, length: int) -> tuple[Tensor, Tensor, Tensor, PagedBatch]:
    """A run of a sequence that has the blocks 3 and 1. -> ids, positions, slots, what attention is told"""
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    positions = torch.arange(start, start + length)
    slots = (table[0, positions // 16] * 16 + positions % 16).to(torch.int32)
    starts, context = torch.tensor([0, length], dtype=torch.int32), torch.tensor([start + length], dtype=torch.int32)
    runs = PagedBatch(starts, context, table, length, length, 32)
    return torch.tensor(IDS[start : start + length]), positions, slots, runs


def logits(decoder: Decoder, cache: Any) -> Tensor:
    """Scores after a prompt in two chunks and one more token. [2, vocab]"""
    rows = []
    for start, length in ((0, 6), (6, 2), (8, 1)):
        ids, positions, slots, runs = batch(start, length)
        step = StepInputs(ids, positions, None, slots, [runs])
        rows.append(decoder.logits(decoder.forward(step, cache)[-1:]))
    return torch.cat(rows[1:]).float()


def load(weight: Tensor, bias: Tensor | None = None) -> Linear:
    return Panels(product.pack("bf16", (weight,), (bias,), None))


def load_gated(gate: Tensor, up: Tensor, activation: str, *biases: Tensor | None) -> Gated:
    return GatedPanels(product.pack("bf16", (gate, up), biases or (None, None), activation), activation)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_model_computes_the_same(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "model", family)
    config, names = describe(folder)
    entries = read_weights(folder)

    def decoder(form: Format) -> Decoder:
        return Decoder.load(entries, config, names, torch.bfloat16, 64, form)

    plain = decoder(FORMATS["none"])
    expected = logits(plain, plain.new_cache(5, 16))

    launched: list[str] = []

    def instead(target: str, function: Any) -> None:
        def counted(*args: Any, **kwargs: Any) -> Any:
            launched.append(target)
            return function(*args, **kwargs)

        monkeypatch.setattr(target, counted)

    instead("penstock.models.attention.paged_attention", attention.paged_attention)
    instead("penstock.models.attention.rotate_into_cache", rotary.rotate_into_cache)
    instead("penstock.models.norms.rms_norm", lambda x, weight, eps: norms.norm(x, "rms", weight, eps=eps)[0])
    instead("penstock.kernels.triton.product._few", product._few)
    if config.experts is not None:
        instead("penstock.kernels.triton.experts.expert_products", experts.expert_products)
    ours = decoder(Format(load, load_gated, None))
    got = logits(ours, ours.new_cache(5, 16))
    assert ours.flows
    assert len(set(launched)) == (4 if config.experts is None else 5)
    assert (got - expected).norm() <= 0.02 * expected.norm()
    assert got.argmax(dim=1).tolist() == expected.argmax(dim=1).tolist()
