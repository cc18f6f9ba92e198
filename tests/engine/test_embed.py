"""What is read off a prompt: embeddings and log-probabilities, against transformers, in chunks and after preemption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.output import SequenceOutput
from penstock.engine.request import Embed, EngineRequest
from penstock.errors import InvalidRequest
from tests.checkpoints import save_tiny


def outputs(engine: EngineLoop, requests: list[EngineRequest]) -> dict[int, list[SequenceOutput]]:
    """Every output of each request."""
    results: dict[int, list[SequenceOutput]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step().outputs:
            results[output.id].append(output)
    return results


def prompt(n: int, seed: int = 0) -> list[int]:
    return torch.randint(5, 512, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def vector(*outputs: SequenceOutput) -> torch.Tensor:
    """The embedding of all outputs of one request, flat."""
    raw = b"".join(output.embedding or b"" for output in outputs)
    return torch.frombuffer(bytearray(raw), dtype=torch.float32)


@torch.inference_mode()
def reference(folder: Path, ids: list[int]) -> torch.Tensor:
    """transformers' last hidden states behind the final norm, averaged."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model.model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)


@pytest.mark.parametrize("budget", [2048, 16])
def test_embeddings_are_transformers(tiny_llama: Path, budget: int) -> None:
    """Alone, in chunks, beside requests that generate, and twice, when the prompt's blocks could be shared."""
    engine = EngineLoop.load(EngineConfig(str(tiny_llama), dtype="float32", max_batch_prefill_tokens=budget))
    prompts = {i: prompt(n, seed=i) for i, n in enumerate((1, 16, 50, 100, 100), start=1)}
    prompts[5] = prompts[4]
    requests = [EngineRequest(i, ids, 0, embed=Embed()) for i, ids in prompts.items()]
    others = [EngineRequest(100 + i, ids, 6, ignore_eos=True) for i, ids in prompts.items()]
    results = outputs(engine, [*others, *requests])
    for i, ids in prompts.items():
        (output,) = results[i]
        assert output.finish == "length"
        assert output.tokens == []
        assert output.queue_seconds is not None
        assert torch.allclose(vector(output), reference(tiny_llama, ids), atol=2e-5)
        assert sum(len(o.tokens) for o in results[100 + i]) == 6
    assert torch.allclose(vector(results[4][0]), vector(results[5][0]), atol=1e-5)
    assert engine.stats.used_blocks == 0


@torch.inference_mode()
def all_states(folder: Path, ids: list[int]) -> torch.Tensor:
    """transformers' hidden states, [layers + 1, tokens, hidden]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.stack(model(torch.tensor([ids]), output_hidden_states=True).hidden_states)[:, 0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("budget", [2048, 24])
def test_states_of_every_layer_are_transformers(tmp_path: Path, family: str, budget: int) -> None:
    """Token by token and pooled in each way, in one batch, in chunks, beside a request that generates."""
    folder = save_tiny(tmp_path / family, family)
    engine = EngineLoop.load(EngineConfig(str(folder), dtype="float32", max_batch_prefill_tokens=budget))
    ids = prompt(70, seed=9)
    truth = all_states(folder, ids)
    asked = {
        1: Embed((0, 1, 2, 3), "none"),
        2: Embed((-1, 0, -2), "mean"),
        3: Embed((1,), "last"),
        4: Embed((3, -3), "first"),
        5: Embed((2,), "none"),
    }
    requests = [EngineRequest(i, ids, 0 if i < 5 else 3, embed=embed, ignore_eos=True) for i, embed in asked.items()]
    results = outputs(engine, [*requests, EngineRequest(9, ids[:50], 6, ignore_eos=True)])
    pooled = {
        1: truth,
        2: truth[[3, 0, 2]].mean(dim=1),
        3: truth[1, -1],
        4: truth[[3, 1], 0],
        5: truth[2],
    }
    for i, expected in pooled.items():
        if asked[i].pooling == "none":
            width = len(asked[i].layers)
            parts = [vector(o).view(width, -1, 64) for o in results[i] if o.embedding]
            assert (len(parts) > 1) == (budget == 24)
            found = torch.cat(parts, dim=1)
        else:
            found = vector(*results[i])
        assert torch.allclose(found.flatten(), expected.flatten(), atol=3e-5), i
    assert sum(len(o.tokens) for o in results[5]) == 3
    assert engine.stats.used_blocks == 0


def test_states_after_preemption(tiny_llama: Path) -> None:
    ids = prompt(60)
    tight = EngineConfig(
        str(tiny_llama), dtype="float32", max_total_tokens=128, max_batch_total_tokens=144, max_batch_prefill_tokens=24
    )
    engine = EngineLoop.load(tight)
    request = EngineRequest(1, ids, 5, ignore_eos=True, embed=Embed((0, -1), "none"))
    others = [EngineRequest(i, prompt(40, seed=i), 40, ignore_eos=True, priority=-1) for i in range(2, 6)]
    results = outputs(engine, [request, *others])[1]
    assert engine.stats.preemptions > 0
    found = torch.cat([vector(o).view(2, -1, 64) for o in results if o.embedding], dim=1)
    assert torch.allclose(found, all_states(tiny_llama, ids)[[0, 3]], atol=3e-5)


@pytest.mark.parametrize("layers", [(), (4,), (-5,), (0, 0, 0, 0, 0)])
def test_layers_that_are_not_there(tiny_llama: Path, layers: tuple[int, ...]) -> None:
    engine = EngineLoop.load(EngineConfig(str(tiny_llama), dtype="float32"))
    with pytest.raises(InvalidRequest, match="0 to 3"):
        engine.add(EngineRequest(1, [5, 6], 0, embed=Embed(layers)))


def test_an_embedding_with_text_and_the_prompts_scores(tiny_llama: Path) -> None:
    """All of it in one request, and again after being preempted."""
    ids = prompt(60)
    request = EngineRequest(
        1, ids, 5, ignore_eos=True, embed=Embed(), prompt_logprobs=True, prompt_top_n=3, logprobs=True
    )
    calm = EngineLoop.load(EngineConfig(str(tiny_llama), dtype="float32"))
    first, *rest = outputs(calm, [request])[1]
    assert len(rest) == 4
    assert all(o.embedding is None and o.prompt_logprobs is None and o.prompt_top is None for o in rest)
    assert first.prompt_logprobs is not None
    assert first.prompt_top is not None
    assert len(first.prompt_logprobs) == len(first.prompt_top) == 60
    assert (first.prompt_logprobs[0], first.prompt_top[0]) == (None, [])
    for token, logprob, top in zip(ids[1:], first.prompt_logprobs[1:], first.prompt_top[1:], strict=True):
        assert len(top) >= 3
        assert dict(top).get(token, logprob) == logprob
    tight = EngineConfig(
        str(tiny_llama),
        dtype="float32",
        max_total_tokens=128,
        max_batch_total_tokens=144,
        max_batch_prefill_tokens=24,
    )
    engine = EngineLoop.load(tight)
    others = [EngineRequest(i, prompt(40, seed=i), 40, ignore_eos=True, priority=-1) for i in range(2, 6)]
    again = outputs(engine, [request, *others])[1][0]
    assert engine.stats.preemptions > 0
    assert torch.allclose(vector(again), vector(first), atol=2e-5)
    assert again.prompt_logprobs[1:] == pytest.approx(first.prompt_logprobs[1:], abs=2e-4)


def test_only_the_prompts_scores(tiny_llama: Path) -> None:
    """max_new_tokens 0: the scores are those of a request that also generates."""
    engine = EngineLoop.load(EngineConfig(str(tiny_llama), dtype="float32", max_batch_prefill_tokens=16))
    ids = prompt(40, seed=3)
    asked = EngineRequest(1, ids, 0, prompt_logprobs=True, prompt_top_n=2)
    more = EngineRequest(2, ids, 3, prompt_logprobs=True, prompt_top_n=2)
    results = outputs(engine, [asked, more])
    (only,) = results[1]
    assert (only.finish, only.tokens) == ("length", [])
    assert only.prompt_logprobs[1:] == pytest.approx(results[2][0].prompt_logprobs[1:], abs=1e-5)
    assert [[i for i, _ in top] for top in only.prompt_top] == [[i for i, _ in t] for t in results[2][0].prompt_top]


def test_broken_numbers_are_an_error(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][77] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    engine = EngineLoop.load(EngineConfig(str(folder), max_batch_prefill_tokens=8))
    requests = [
        EngineRequest(1, [5, 77, 6], 0, embed=Embed()),
        EngineRequest(2, [5, 77, 6], 0, prompt_logprobs=True),
        EngineRequest(3, [5, 6], 0, embed=Embed()),
        EngineRequest(4, [5, 77, *[6] * 40], 0, embed=Embed((0,), "none")),  # broken in its first part
    ]
    results = outputs(engine, requests)
    assert [results[i][-1].finish for i in (1, 2, 3, 4)] == ["error", "error", "length", "error"]
    assert engine.stats.used_blocks == 0


def test_stop_ids_end_like_the_end_of_sequence(tiny_llama: Path) -> None:
    engine = EngineLoop.load(EngineConfig(str(tiny_llama), dtype="float32"))
    ids = prompt(10, seed=8)
    free = outputs(engine, [EngineRequest(1, ids, 12, ignore_eos=True)])[1]
    made = [o.tokens[0].id for o in free]
    stop = made[5]
    at = made.index(stop)
    for request in (
        EngineRequest(2, ids, 12, ignore_eos=True, stop_ids=[stop]),
        EngineRequest(3, ids, 12, stop_ids=[511, stop]),
        EngineRequest(4, ids, at + 1, ignore_eos=True, stop_ids=[stop]),
        EngineRequest(5, ids, 12, ignore_eos=True, stop_ids=[stop], min_new_tokens=at + 2),
    ):
        got = outputs(engine, [request])[request.id]
        tokens = [o.tokens[0].id for o in got]
        if request.id == 5:
            assert len(tokens) >= at + 2
            assert stop not in tokens[: at + 1]
        else:
            assert tokens == made[: at + 1]
            assert got[-1].finish == ("length" if request.id == 4 else "eos_token")  # length goes first, as in TGI
