"""Models that no family describes, through transformers: tokens, batches, states, refusals, placement, own code."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
)

from penstock.devices.memory import available_bytes
from penstock.engine.request import Embed, EngineRequest, Sampling
from penstock.engine.step import GATHERED
from penstock.errors import InvalidRequest, ModelError, ResourceError, UsageError
from penstock.kernels.attention import RunGroup
from penstock.models.fallback.own import OwnMemory
from penstock.models.fallback.paged import PagedTransformer
from penstock.models.fallback.trace import CannotReplace, Visible, visible
from penstock.models.inputs import StepInputs
from tests.checkpoints import save_model, save_tokenizer
from tests.engine.driver import generate, started
from tests.engine.exactness import generated, made_prompts, reference
from tests.families import SHAPES
from tests.others import OTHERS, OWN, PAGED
from tests.process import check_error, penstock

LONG = bool(os.environ.get("PENSTOCK_LONG_TESTS"))
ROWS = made_prompts(3, 70, 512)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def asked(rows: list[list[int]], new: int, **options: Any) -> list[EngineRequest]:
    return [EngineRequest(i, row, new, ignore_eos=True, **options) for i, row in enumerate(rows)]


# transformers' RWKV mixes the texts of a batch up; its RecurrentGemma keeps a part of its memory in its layers
_OFTEN = ("persimmon", "helium", "ctrl", "codegen", "gpt-neo")  # kinds that the others show as well
_WAYS = {"rwkv": "one sequence at a time: ", "recurrent-gemma": "one sequence to its end before the next: "}


@pytest.mark.parametrize("name", [name for name in OTHERS if LONG or name not in _OFTEN])
def test_tokens_match_transformers(name: str, tmp_path: Path) -> None:
    """128 tokens of prompts that run together, computed in chunks, against transformers' own generation."""
    folder = save_model(tmp_path, OTHERS[name])
    engine, stages = started(folder, max_batch_prefill_tokens=48)
    way = "our paged cache" if name in PAGED else _WAYS.get(name, "in static batches: ")
    assert "by transformers (no description of ours)" in stages["model"]
    assert way in stages["model"]
    together = generate(engine, asked(ROWS, 128))
    for i, row in enumerate(ROWS):
        assert together[i].error is None
        assert together[i].ids == generated(folder, row, 128)[0], row
    assert engine.stats.used_blocks == 0


@pytest.mark.parametrize("name", ["exaone4", "biogpt", "mamba", "codegen"])
def test_the_schedule_changes_nothing(name: str, tmp_path: Path) -> None:
    """Together or one after another, in small chunks or whole, with a cached prefix, with another that is aborted."""
    folder = save_model(tmp_path, OTHERS[name])
    rows = [*ROWS, [*ROWS[0][:20], 7, 8, 9]]
    draws = Sampling(temperature=0.8, top_p=0.9, do_sample=True, seed=5)
    alone, _ = started(folder, max_batch_size=1)
    kinds = (Sampling(), draws)
    expected = [generate(alone, asked(rows, 30, sampling=kind, logprobs=True)) for kind in kinds]
    engine, _ = started(folder, max_batch_prefill_tokens=13, max_batch_size=3, block_size=4)
    for kind, known in zip(kinds, expected, strict=True):
        for _again in range(2):
            engine.add(EngineRequest(99, [5] * 40, 40))
            engine.step()
            engine.abort(99)
            got = generate(engine, asked(rows, 30, sampling=kind, logprobs=True))
            for i in known:
                assert got[i].ids == known[i].ids
                assert np.allclose(got[i].logprobs, known[i].logprobs, atol=1e-4)  # type: ignore[arg-type]
    if name in PAGED:
        assert engine.stats.cached_prompt_tokens > 0
    assert engine.stats.used_blocks == 0


@pytest.mark.parametrize("name", ["glm", "mamba", "codegen"])
def test_states_and_scores_of_prompts(name: str, tmp_path: Path) -> None:
    """Hidden states of every layer and log-probabilities of the prompt, in chunks, beside one that generates."""
    folder = save_model(tmp_path, OTHERS[name])
    engine, _ = started(folder, max_batch_prefill_tokens=16)
    row, layers = ROWS[0][:40], (-4, -3, -2, -1)
    engine.add(EngineRequest(1, row, 0, embed=Embed(layers, "none"), prompt_logprobs=True))
    engine.add(EngineRequest(2, ROWS[1], 10, ignore_eos=True))
    states: list[Any] = []
    logprobs: list[float | None] = []
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            if output.embedding:
                states.append(np.frombuffer(output.embedding, np.float32).reshape(len(layers), -1, 64))
            logprobs += output.prompt_logprobs or []
    with torch.inference_mode():
        out = reference(folder)(torch.tensor([row]), output_hidden_states=True)
    theirs = torch.stack([out.hidden_states[i][0] for i in layers]).numpy()
    assert np.abs(np.concatenate(states, axis=1) - theirs).max() < 1e-3
    scores = torch.log_softmax(out.logits[0].float(), -1)
    expected = scores[:-1].gather(1, torch.tensor(row[1:]).unsqueeze(1)).squeeze(1)
    assert np.allclose(logprobs[1:], expected.numpy(), atol=1e-3)


@pytest.mark.parametrize("name", ["mamba", "rwkv", "recurrent-gemma", "glm", "lfm2"])
def test_the_way_is_the_same_in_half_the_bytes(name: str, tmp_path: Path) -> None:
    """What is wrong must not pass for rounding."""
    folder = save_model(tmp_path, OTHERS[name])
    way = "our paged cache" if name in PAGED else _WAYS.get(name, "in static batches: ")
    assert way in started(folder, dtype="bfloat16")[1]["model"]


@pytest.mark.parametrize("name", ["mamba", "codegen"])
def test_memories_are_joined(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrent model computes all texts together, one with attention those of equal length; texts come and go."""
    folder = save_model(tmp_path, OTHERS[name])
    rows = [ROWS[0][:20], ROWS[1][:20], ROWS[0][5:25], ROWS[2][:9]]
    new = [12, 30, 20, 25]
    requests = [EngineRequest(i, row, n, ignore_eos=True) for i, (row, n) in enumerate(zip(rows, new, strict=True))]
    alone, _ = started(folder, max_batch_size=1)
    expected = generate(alone, requests)
    engine, _ = started(folder)
    sizes: list[int] = []
    advance = OwnMemory._advance

    def counted(self: OwnMemory, texts: list[Any], *rest: Any) -> Any:
        sizes.append(len(texts))
        return advance(self, texts, *rest)

    monkeypatch.setattr(OwnMemory, "_advance", counted)
    got = generate(engine, requests)
    assert [got[i].ids for i in got] == [expected[i].ids for i in got]
    assert sum(sizes) == sum(new)  # a token each, a prompt in one go
    assert max(sizes) == (4 if name == "mamba" else 3)
    assert len(sizes) == (1 + 30 if name == "mamba" else 30 + 25)


@torch.inference_mode()
def test_a_step_is_computed_where_the_model_is(tmp_path: Path) -> None:
    """A device that holds no numbers refuses to meet those of another; only the scores would come home."""
    folder = save_model(tmp_path / "model", OTHERS["persimmon"])
    engine, _stages = started(folder)
    model, there = engine._decoder, torch.device("meta")
    assert isinstance(model, PagedTransformer)
    model._model.to(there)
    model.device = there
    cache = model.new_cache(8, 4)
    groups = [RunGroup(0, 3, [3, 3], torch.tensor([[1], [2]]))]
    slots, positions = torch.tensor([4, 5, 6, 8, 9, 10]), torch.tensor([0, 1, 2] * 2)
    step = StepInputs(torch.arange(6), positions, None, slots, groups)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="meta"):  # the copy to the host
        model.forward(step.to(there), cache)
    with pytest.raises(RuntimeError, match="meta"):  # of a step that was left there
        model.forward(step, cache)


def test_a_sequence_that_is_not_a_number_harms_nobody(tmp_path: Path) -> None:
    folder = save_model(tmp_path, PAGED["glm"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    engine, _ = started(folder)
    rows = [[n for n in row if n != 7] for row in ROWS]
    expected = generate(engine, asked(rows, 20))
    got = generate(engine, asked([*rows, [3, 7, 4]], 20))
    assert "not numbers" in (got[3].error or "")
    assert all(got[i].ids == expected[i].ids or 7 in expected[i].ids for i in range(3))
    assert engine.stats.used_blocks == 0


def _bridges(_batch: Any, _head: Any, query: Tensor, key: Tensor) -> Tensor:
    return key < 4


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (causal_mask_function, Visible()),
        (sliding_window_causal_mask_function(1), Visible(window=1)),
        (sliding_window_causal_mask_function(24), Visible(window=24)),
        (sliding_window_causal_mask_function(4096), Visible(window=4096)),
        (chunked_causal_mask_function(24, torch.zeros(1, dtype=torch.int64)), Visible(chunk=24)),
        (or_masks(sliding_window_causal_mask_function(24), _bridges), None),
    ],
)
def test_what_a_mask_lets_through(function: Callable[..., Tensor], expected: Visible | None) -> None:
    if expected is not None:
        assert visible(function) == expected
    else:
        with pytest.raises(CannotReplace):
            visible(function)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "unsupported architecture: BertForMaskedLM"),
        ({"model_type": "t0", "architectures": ["T0ForNothing"]}, "unsupported architecture: T0ForNothing"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized .gptq."),
        ({"num_hidden_layers": 4}, "does not fit its config.json"),
        ({"hidden_act": 7}, "transformers cannot"),
        ({"attn_implementation": "evil/kernels"}, "load something from elsewhere"),
        ({"text_config": {"_attn_implementation": {"": "evil/kernels"}}}, "load something from elsewhere"),
    ],
)
def test_what_cannot_run_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path, PAGED["glm"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=words) as caught:
        started(folder)
    assert len(str(caught.value).splitlines()) <= 6


def test_the_attention_of_another_machine_is_not_asked_for(tmp_path: Path) -> None:
    """Some published configurations name the one that their author had."""
    folder = save_model(tmp_path, OWN["gpt-oss"])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "flash_attention_2"}))
    assert len(generate(started(folder)[0], asked(ROWS, 5))[0].ids) == 5


def test_options_of_our_own_decoder_are_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path, PAGED["glm"])
    for options in ({"quantize": "int8"}, {"rope_scaling": "linear", "rope_factor": 2.0}):
        with pytest.raises(UsageError, match="families that Penstock describes"):
            started(folder, **options)
    with pytest.raises(ModelError, match="takes no adapters"):
        started(folder, adapters={"a": str(tmp_path)})
    engine, stages = started(folder, dtype="auto", quantize="bf16")
    with pytest.raises(ModelError, match="takes no adapters"):
        engine.adapters.load("a", tmp_path)
    assert "in bfloat16" in stages["model"]
    assert "our paged cache" in stages["model"]
    assert len(generate(engine, asked(ROWS, 5))[0].ids) == 5
    engine.limits = msgspec.structs.replace(engine.limits, hidden_states=False)
    with pytest.raises(InvalidRequest, match="no hidden states"):
        engine.add(EngineRequest(1, [1], 0, embed=Embed()))


def test_random_weights_in_the_shape_of_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OWN["mamba"]))
    engine, stages = started(tmp_path, dummy_weights=True)
    assert "random weights" in stages["load"]
    assert len(generate(engine, asked(ROWS, 5))[0].ids) == 5


BIG: dict[str, dict[str, Any]] = {  # of which the weights are more than what a step takes
    "llama": {**SHAPES["llama"], "hidden_size": 256, "intermediate_size": 2048, "head_dim": 64, "num_hidden_layers": 6},
    "phi-3.5-moe": {**PAGED["phi-3.5-moe"], "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6},
    "xglm": {**OWN["xglm"], "d_model": 128, "ffn_dim": 4096, "num_layers": 8},
}


@pytest.mark.parametrize("name", BIG)
def test_what_does_not_fit_is_read_from_disk(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family of ours, one whose weights transformers keeps in another form, one that runs alone: placed, exact."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = save_model(tmp_path / "model", BIG[name])
    stored = (folder / "model.safetensors").stat().st_size
    free = 2 * 128 * GATHERED * 4 + 0.7 * stored  # for a step, and for most of the weights
    few = {"max_batch_prefill_tokens": 16, "max_batch_size": 2, "max_total_tokens": 128}
    engine, stages = started(folder, memory_fraction=free / available_bytes(), **few)
    assert "on disk, read whenever needed" in stages["load"], stages
    assert ("too large for the memory" if name == "llama" else "no description") in stages["model"]
    assert 2**20 < float(stages["load"].split(" MiB in memory")[0]) * 2**20 < 0.6 * stored
    got = generate(engine, asked(ROWS, 16))
    assert [got[i].ids for i in range(len(ROWS))] == [generated(folder, row, 16)[0] for row in ROWS]
    kept = list((tmp_path / "cache" / "penstock").glob("offload-*"))
    assert bool(kept) == (name == "phi-3.5-moe")


def test_without_accelerate_the_sums_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "accelerate" else 1)
    folder = save_model(tmp_path, BIG["llama"])
    with pytest.raises(ResourceError, match="too little memory") as caught:
        started(folder, memory_fraction=2**20 / available_bytes())
    assert "pip install accelerate" in caught.value.hint


# A model whose folder brings its own code: a decoder that neither Penstock nor transformers knows.
CODE = '''
import socket, torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, GenerationMixin
from transformers.modeling_outputs import CausalLMOutput
from .configuration_bag import BagConfig

try:
    socket.create_connection(("127.0.0.1", {port}), 2).close()
    print("NETWORK REACHED", flush=True)
except OSError as error:
    print("network:", error, flush=True)

class BagForCausalLM(PreTrainedModel, GenerationMixin):
    """The mean of what was read, through two matrices; it remembers nothing."""
    config_class = BagConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(config.vocab_size, config.hidden_size)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {{"input_ids": input_ids}}

    def forward(self, input_ids, return_dict=None):
        x = self.table(input_ids).cumsum(1) / torch.arange(1, input_ids.shape[1] + 1).view(1, -1, 1)
        return CausalLMOutput(logits=self.head(torch.tanh(x)))
'''
CONFIGURATION = """
from transformers import PreTrainedConfig

class BagConfig(PreTrainedConfig):
    model_type = "bag-of-words"

    def __init__(self, vocab_size=512, hidden_size=32, num_hidden_layers=1, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**kwargs)
"""


def save_bag(folder: Path, port: int = 9) -> Path:
    """A model with code of its own, weights, and a tokenizer."""
    folder.mkdir()
    (folder / "modeling_bag.py").write_text(CODE.format(port=port))
    (folder / "configuration_bag.py").write_text(CONFIGURATION)
    config = {
        "model_type": "bag-of-words",
        "architectures": ["BagForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_bag.BagConfig",
            "AutoModelForCausalLM": "modeling_bag.BagForCausalLM",
        },
        "vocab_size": 512,
        "hidden_size": 32,
        "eos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    weights = {"table.weight": torch.randn(512, 32), "head.weight": torch.randn(512, 32), "head.bias": torch.randn(512)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    save_tokenizer(folder)
    return folder


def bag(folder: Path, row: list[int], new: int) -> list[int]:
    """Its greedy continuation, by hand."""
    w, row = load_file(folder / "model.safetensors"), list(row)
    for _ in range(new):
        row.append(int((torch.tanh(w["table.weight"][row].mean(0)) @ w["head.weight"].T + w["head.bias"]).argmax()))
    return row[-new:]


def test_a_models_own_code_runs_only_when_trusted_and_without_network(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        folder = save_bag(tmp_path / "bag", listener.getsockname()[1])
        row = [5, 9, 200]
        (tmp_path / "rows.jsonl").write_text(json.dumps({"id": 1, "prompt_token_ids": row}) + "\n")
        arguments = ("generate", folder, "--input", tmp_path / "rows.jsonl", "--max-new-tokens", "12", "--ignore-eos")
        refused = penstock(*arguments, "--output", tmp_path / "a.jsonl", home=tmp_path)
        check_error(refused, 4, "Python code of its own", "--trust-remote-code")
        assert b"network" not in refused.stdout + refused.stderr  # nothing of it ran
        done = penstock(*arguments, "--output", tmp_path / "b.jsonl", "--trust-remote-code", home=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    text = done.stdout.decode() + done.stderr.decode()
    assert "its own code without network" in text
    if sys.platform == "linux":
        assert "NETWORK REACHED" not in text
        assert "network: [Errno 1]" in text
    answer = json.loads((tmp_path / "b.jsonl").read_text().splitlines()[0])
    assert answer["token_ids"] == bag(folder, row, 12)


@pytest.mark.parametrize("kind", ["elsewhere", "linked", "none for text"])
def test_code_that_is_not_all_in_the_folder_is_refused(kind: str, tmp_path: Path) -> None:
    folder = save_bag(tmp_path / "bag")
    config = json.loads((folder / "config.json").read_text())
    if kind == "elsewhere":
        config["auto_map"]["AutoModelForCausalLM"] = "evil/repo--modeling_bag.BagForCausalLM"
    elif kind == "linked":
        (tmp_path / "other.py").write_text("raise SystemExit(7)")
        os.symlink(tmp_path / "other.py", folder / "helper.py")
    else:
        config["auto_map"] = {"AutoModel": "modeling_bag.BagForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    words = {"elsewhere": "not in its folder", "linked": "leads out", "none for text": "none for a causal"}[kind]
    with pytest.raises(ModelError, match=words):
        started(folder, trust_remote_code=True)


def test_code_of_a_known_architecture_is_not_needed(tmp_path: Path) -> None:
    """As the hub's Phi-3 has it: the code is older than the library that knows the model now."""
    folder = save_model(tmp_path, SHAPES["llama"])
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "gone.C", "AutoModelForCausalLM": "gone.M"}
    (folder / "config.json").write_text(json.dumps(config))
    _engine, stages = started(folder)
    assert stages["model"].startswith("llama decoder")
