"""LoRA adapters in the engine: exact against PEFT's merged models, many in one batch, loaded and unloaded, refused."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest
from penstock.errors import InvalidRequest, ModelError, PenstockError, ResourceError
from penstock.formats import FORMATS
from penstock.kernels import products
from penstock.models import decoder
from tests.adapters import merged, save_adapter, tensors_of, write_adapter
from tests.checkpoints import save_model
from tests.engine.driver import Generated, generate
from tests.engine.exactness import foreseen, made_prompts, reference
from tests.families import SHAPES

LONG = bool(os.environ.get("PENSTOCK_LONG_TESTS"))
UNFIT = ("gemma-3-4b", "opt-350m")  # all their linears are more than those of layers


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), SHAPES["llama"])


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Eight, of different ranks and for different matrices."""
    root = tmp_path_factory.mktemp("adapters")
    kinds: list[dict[str, Any]] = [
        {},
        {"r": 1, "target_modules": ["q_proj", "v_proj"]},
        {"r": 16, "target_modules": ["down_proj"]},
        {"r": 3, "target_modules": ["gate_proj"], "use_rslora": True},
        {"target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj"},
        {"target_modules": ["k_proj", "o_proj"], "rank_pattern": {"k_proj": 7}, "alpha_pattern": {"o_proj": 3}},
        {"r": 5, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2]},
        {
            "r": 8,
            "rank_pattern": {r"layers\.1\.mlp\.gate_proj": 2},
            "alpha_pattern": {r"^model\.layers\.\d+\.self_attn\..*": 5},
        },
    ]
    return {f"a{i}": save_adapter(base, root / f"a{i}", seed=i, **kind) for i, kind in enumerate(kinds)}


def start(folder: Path, given: dict[str, Path] | None = None, **options: Any) -> EngineLoop:
    named = {name: str(path) for name, path in (given or {}).items()}
    return EngineLoop.load(EngineConfig(str(folder), adapters=named, **{"dtype": "float32", **options}))


def asked(rows: list[list[int]], names: list[str | None], new: int = 12) -> list[EngineRequest]:
    return [
        EngineRequest(id=i, prompt_ids=row, max_new_tokens=new, ignore_eos=True, logprobs=True, adapter=name)
        for i, (row, name) in enumerate(zip(rows, names, strict=True))
    ]


def check_against(model: PreTrainedModel, row: list[int], found: Generated) -> None:
    """The tokens are the model's own, and their log-probabilities within 1e-4."""
    assert found.error is None, found.error
    ids, scores = foreseen(model, row, found.ids)
    assert found.ids == ids
    theirs = torch.log_softmax(scores[-len(ids) :].double(), dim=-1)[range(len(ids)), ids]
    assert float((theirs - torch.tensor(found.logprobs).double()).abs().max()) <= 1e-4


@pytest.mark.parametrize("name", [*(n for n in SHAPES if n not in UNFIT), "gpt-2-odd"])
def test_an_adapter_is_the_merged_model(name: str, tmp_path: Path) -> None:
    """On all linears of every family, in chunks, beside rows of the base. odd: heads of 15 dimensions."""
    odd = {"n_embd": 60} if name.endswith("-odd") else {}
    folder = save_model(tmp_path / "base", SHAPES[name.removesuffix("-odd")] | odd)
    adapter = save_adapter(folder, tmp_path / "adapter")
    rows = made_prompts(4, 60, 512)
    engine = start(folder, {"a": adapter}, max_batch_prefill_tokens=64)
    found = generate(engine, asked(rows, ["a", None, "a", None]))
    models = {True: merged(folder, adapter), False: reference(folder)}
    for i, row in enumerate(rows):
        check_against(models[i % 2 == 0], row, found[i])
    with pytest.raises(AssertionError):  # it does make a difference
        check_against(models[False], rows[0], found[0])


def test_experts_stored_the_other_way_round(tmp_path: Path) -> None:
    """Llama 4's are [in, out]; their adapters are asked for as parameters."""
    folder = save_model(tmp_path / "base", SHAPES["llama4"])
    names = [f"feed_forward.experts.{part}_proj" for part in ("gate_up", "down")]
    adapter = save_adapter(folder, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=names)
    rows = made_prompts(3, 60, 512)
    found = generate(start(folder, {"a": adapter}), asked(rows, ["a"] * 3))
    model = merged(folder, adapter)
    for i, row in enumerate(rows):
        check_against(model, row, found[i])


def test_single_experts_by_the_names_of_the_files(tmp_path: Path) -> None:
    """As PEFT wrote them when each expert was a module."""
    folder = save_model(tmp_path / "base", SHAPES["mixtral"])
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if module.endswith(("q_proj", "v_proj", "o_proj", ".gate", "experts.0.w1", "experts.2.w3", "experts.1.w2")):
            a = torch.randn((4, weight.shape[1]), generator=generator) * 0.05
            b = torch.randn((weight.shape[0], 4), generator=generator) * 0.05
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
            weight += 2 * b @ a
    adapter = write_adapter(tmp_path / "adapter", tensors)
    shutil.copytree(folder, tmp_path / "merged")
    save_file(weights, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    rows = made_prompts(4, 60, 512)
    found = generate(start(folder, {"a": adapter}), asked(rows, ["a"] * 4))
    model = reference(tmp_path / "merged")
    for i, row in enumerate(rows):
        check_against(model, row, found[i])


def test_eight_adapters_in_one_batch(base: Path, adapters: dict[str, Path]) -> None:
    """Each row is its own merged model's, and a row of the base is what it is without any adapter, bit for bit."""
    rows = made_prompts(10, 50, 512, seed=2)
    names: list[str | None] = [*adapters, None, None]
    found = generate(start(base, adapters, max_batch_prefill_tokens=48), asked(rows, names))
    plain = generate(start(base, max_batch_prefill_tokens=48), asked(rows, [None] * 10))
    for i, name in enumerate(names):
        if name is None:
            assert found[i].ids == plain[i].ids
            assert found[i].logprobs == pytest.approx(plain[i].logprobs, abs=1e-5)
        else:
            check_against(merged(base, adapters[name]), rows[i], found[i])


@pytest.mark.skipif(not products.COMPILED, reason="the compiled products are not there")
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "fp8"])  # which is for GPUs
def test_stored_formats(form: str, base: Path, adapters: dict[str, Path]) -> None:
    """Rows of the base are the same bits beside adapters; an adapted row is the merged model's, but for rounding."""
    rows = made_prompts(4, 40, 512, seed=3)
    options = {"dtype": "bfloat16", "quantize": form}
    found = generate(start(base, adapters, **options), asked(rows, ["a0", None, "a4", None], new=4))
    plain = generate(start(base, **options), asked(rows, [None] * 4, new=4))
    for i in (1, 3):
        assert (found[i].ids, found[i].logprobs) == (plain[i].ids, plain[i].logprobs)
    loose = {"none": 0.15, "int8": 0.3, "int4": 1.5}[form]
    for i, name in ((0, "a0"), (2, "a4")):
        _, scores = foreseen(merged(base, adapters[name]), rows[i], found[i].ids)
        theirs = torch.log_softmax(scores[-4:], dim=-1)[range(4), found[i].ids]
        assert float((theirs - torch.tensor(found[i].logprobs)).abs().mean()) < loose


def test_a_gated_product_comes_apart(base: Path) -> None:
    """The halves of the fused product are the two products, in every form and for widths that fill no panel."""
    torch.manual_seed(0)
    for name, form in FORMATS.items():
        for n, k in ((128, 64), (100, 64), (40, 32)):
            weights = [(torch.randn(n, k) * 0.2).bfloat16() for _ in range(2)]
            biases = [torch.randn(n).bfloat16(), None]
            x = torch.randn(5, k).bfloat16()
            halves = form.load_gated(*weights, "silu", *biases).halves(x)
            for half, weight, bias in zip(halves, weights, biases, strict=True):
                assert torch.equal(half, form.load(weight, bias)(x)), (name, n, k)


def test_what_is_cached_belongs_to_one_loading(base: Path, adapters: dict[str, Path]) -> None:
    """A prefix is found again under the same adapter, not under another, the base, or another file of that name."""
    engine = start(base, {"x": adapters["a0"], "y": adapters["a1"]})
    row = made_prompts(1, 60, 512, seed=4)[0] * 4

    def cached(name: str | None) -> int:
        before = engine.stats.cached_prompt_tokens
        [found] = generate(engine, asked([row], [name], new=2)).values()
        assert found.error is None
        return engine.stats.cached_prompt_tokens - before

    assert [cached("x"), cached("y"), cached(None)] == [0, 0, 0]
    assert min(cached("x"), cached("y"), cached(None)) > 0
    engine.adapters.load("x", adapters["a2"], replace=True)
    assert cached("x") == 0
    expected = foreseen(merged(base, adapters["a2"]), row, (found := generate(engine, asked([row], ["x"])))[0].ids)[0]
    assert found[0].ids == expected


def test_preempted_sequences_keep_their_adapter(base: Path, adapters: dict[str, Path]) -> None:
    rows = made_prompts(6, 50, 512, seed=5)
    names: list[str | None] = ["a0", "a1", None, "a2", "a0", None]
    expected = generate(start(base, adapters), asked(rows, names, new=40))
    engine = start(base, adapters, max_total_tokens=96, max_batch_total_tokens=112)
    found = generate(engine, asked(rows, names, new=40))
    assert engine.stats.preemptions > 0
    assert {i: f.ids for i, f in found.items()} == {i: f.ids for i, f in expected.items()}


def test_unloading_while_requests_run(base: Path, adapters: dict[str, Path]) -> None:
    """Those that run finish with it; its memory returns with the last of them; new ones are refused."""
    row = made_prompts(1, 30, 512, seed=6)[0]
    [expected] = generate(start(base, adapters), asked([row], ["a0"])).values()
    engine = start(base, {"a0": adapters["a0"]})
    taken = engine.adapters.nbytes
    assert taken > 0
    engine.add(asked([row], ["a0"])[0])
    ids = [token.id for _ in range(3) for output in engine.step().outputs for token in output.tokens]
    engine.adapters.unload("a0")
    engine.adapters.load("a1", adapters["a1"])
    assert engine.adapters.nbytes > taken
    with pytest.raises(InvalidRequest, match=r"no adapter `a0`; loaded: a1"):
        engine.add(asked([row, row], [None, "a0"])[1])
    while engine.has_work:
        ids += [token.id for output in engine.step().outputs for token in output.tokens]
    assert ids == expected.ids
    assert 0 < engine.adapters.nbytes < taken
    with pytest.raises(InvalidRequest, match="no adapter `a0`"):
        engine.adapters.unload("a0")


def test_bounds(base: Path, adapters: dict[str, Path]) -> None:
    """On their number, their rank and their bytes; what is refused changes nothing."""
    engine = start(base, {"a0": adapters["a0"]}, max_adapters=2, max_adapter_rank=8)
    with pytest.raises(ResourceError, match="rank 16, more than 8") as refused:
        engine.adapters.load("wide", adapters["a2"])
    assert "--max-adapter-rank 16" in str(refused.value)
    engine.adapters.load("a1", adapters["a1"])
    with pytest.raises(ResourceError, match="2 adapters at a time"):
        engine.adapters.load("a3", adapters["a3"])
    with pytest.raises(InvalidRequest, match="loaded already"):
        engine.adapters.load("a1", adapters["a1"])
    engine.adapters.load("a1", adapters["a3"], replace=True)
    taken = start(base, {"a0": adapters["a0"]}).adapters.nbytes
    tight = start(base, {"a0": adapters["a0"]}, max_adapter_bytes=taken)
    with pytest.raises(ResourceError, match="too little memory for the adapter") as refused:
        tight.adapters.load("a1", adapters["a1"])
    assert "--max-adapter-bytes" in str(refused.value)
    with pytest.raises(ResourceError, match="more than"):
        start(base, adapters, max_adapter_bytes=taken)


def test_memory_is_counted(base: Path, adapters: dict[str, Path]) -> None:
    """The line of the start has the adapters' bytes, and they are what the tensors take."""
    stages: dict[str, str] = {}
    named = {name: str(path) for name, path in adapters.items()}
    config = EngineConfig(str(base), dtype="float32", adapters=named)
    engine = EngineLoop.load(config, lambda stage: stages.update({stage.name: stage.text}))
    assert " + adapters " in stages["KV memory"]
    assert stages["adapters"].startswith("a0, a1, ")
    # q, k and v are one product, so its B has rows for all three
    assert engine.adapters.nbytes >= sum(t.nbytes for path in adapters.values() for t in tensors_of(path).values())
    with pytest.raises(ResourceError, match="too little memory") as refused:
        start(base, adapters, max_adapter_bytes=2**45)
    assert "adapters 32768 GiB (--max-adapter-bytes)" in str(refused.value)


def test_without_adapters_nothing_is_looked_at(
    base: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step where nobody asks for one takes the layers as they are, also where adapters are loaded."""
    calls = 0
    whole = decoder.adapted

    def counted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        return whole(*given)

    monkeypatch.setattr(decoder, "adapted", counted)
    engine = start(base, adapters)
    rows = made_prompts(2, 30, 512)
    generate(engine, asked(rows, [None, None], new=3))
    assert calls == 0
    generate(engine, asked(rows, [None, "a0"], new=3))
    assert calls == 3 * SHAPES["llama"]["num_hidden_layers"]


SETTINGS = [
    ({"peft_type": "LOHA"}, "Its peft_type is 'LOHA'"),
    ({"peft_type": None}, "Its peft_type is 'None'"),
    ({"bias": "all"}, "biases"),
    ({"use_dora": True}, "`use_dora`"),
    ({"modules_to_save": ["lm_head"]}, "`modules_to_save`"),
    ({"lora_bias": True}, "`lora_bias`"),
    ({"trainable_token_indices": [1]}, "`trainable_token_indices`"),
    ({"layer_replication": [[0, 1]]}, "`layer_replication`"),
    ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights` 'pissa_niter_4'"),
    ({"r": 5}, "has rank 4, but adapter_config.json says 5"),
    ({"r": 0}, "`r` is '0'"),
    ({"r": True}, "`r` is 'True'"),
    ({"lora_alpha": "8"}, "`lora_alpha` is '8'"),
    ({"lora_alpha": None}, "`lora_alpha` is 'None'"),
    ({"rank_pattern": []}, None),
    ({"rank_pattern": [1]}, "`rank_pattern` is no object"),
    ({"rank_pattern": {"q_proj": "2"}}, "its `rank_pattern` of 'q_proj' is '2'"),
    ({"alpha_pattern": {"(": 2}}, "no regular expression"),
    ({"alpha_pattern": {"(a+)+b": 2}}, "very long to match"),
    ({"alpha_pattern": {"a?" * 30 + "a" * 30: 2}}, "very long to match"),
    ({"alpha_pattern": {".*.*.*.*x": 2}}, "very long to match"),
    ({"alpha_pattern": {f"model.layers.{i}.self_attn.q_proj": 8 for i in range(3)}}, None),
    ({"rank_pattern": {"model.layers.1.self_attn.q_proj": 3}}, "'model.layers.1.self_attn.q_proj' has rank 4"),
]


@pytest.mark.parametrize(("settings", "words"), SETTINGS)
def test_settings_that_are_refused_by_name(
    settings: dict[str, Any], words: str | None, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in tensors_of(adapters["a0"]).items() if "q_proj" in name}
    adapter = write_adapter(tmp_path / "adapter", tensors, **settings)
    if words is None:
        start(base, {"a": adapter})
        return
    with pytest.raises(ModelError) as refused:
        start(base, {"a": adapter})
    assert words in str(refused.value)
    assert len(str(refused.value).splitlines()) <= 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, t: {name.replace("q_proj", "x_proj"): t}, "x_proj' is no matrix"),
        (lambda name, t: {name.replace("layers.1.", "layers.9."): t}, "layers.9.self_attn.q_proj' is no matrix"),
        (lambda name, t: {name: t[:, :60] if "lora_A" in name else t}, "64 x 60; the model's matrix is 64 x 64"),
        (lambda name, t: {name: t[:60] if "lora_B" in name else t}, "60 x 64; the model's matrix is 64 x 64"),
        (lambda name, t: {} if "lora_B" in name else {name: t}, "only one of its two matrices"),
        (lambda name, t: {name: t[:2] if "lora_A" in name else t}, "matrices of [2, 64] and [64, 4]"),
        (lambda name, t: {name: t.unsqueeze(0)}, "matrices of [1, "),
        (lambda name, t: {name: t * float("nan")}, "numbers that are none"),
        (lambda name, t: {name: t.to(torch.int8)}, "has type I8"),
        (lambda name, t: {name: t, "model.layers.0.self_attn.q_proj.lora_magnitude_vector": t}, "magnitude_vector"),
        (lambda name, t: {name: t, "model.embed_tokens.lora_embedding_A": t}, "lora_embedding_A"),
        (lambda name, t: {name: t, "lm_head.weight": t}, "'base_model.model.lm_head.weight' is no LoRA matrix"),
        (lambda name, t: {name.replace("model.layers", "lm_head.layers"): t}, "Embeddings, heads and towers"),
        (lambda name, t: {name: t, name.removeprefix("model."): t}, "two terms for one matrix"),
        (lambda name, t: {}, "it has no tensors"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Any, words: str, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    tensors = {name: tensor for name, tensor in tensors_of(adapters["a0"]).items() if "q_proj" in name}
    changed = {new: t for name, tensor in tensors.items() for new, t in change(name, tensor).items()}
    adapter = write_adapter(tmp_path / "adapter", changed)
    engine = start(base)
    with pytest.raises(ModelError) as refused:
        engine.adapters.load("a", adapter)
    assert words in str(refused.value)
    assert generate(engine, asked([[1, 2, 3]], [None], new=2))[0].error is None


def test_folders_that_are_none(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    for missing, words in (
        ("adapter_config.json", "is no adapter"),
        ("adapter_model.safetensors", "It has no adapter_model"),
    ):
        folder = tmp_path / missing
        shutil.copytree(adapters["a0"], folder)
        (folder / missing).unlink()
        with pytest.raises(ModelError, match=words):
            start(base, {"a": folder})
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(ModelError, match="pickle"):
        start(base, {"a": folder})
    with pytest.raises(ModelError, match="It is a LoRA adapter"):
        start(adapters["a0"])


def test_damaged_files_are_refused_or_harmless(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """Random bytes changed, cut and added: an error of ours, or an adapter that computes."""
    engine, rng = start(base), random.Random(0)
    folder = tmp_path / "adapter"
    refused = 0
    for _ in range(300 if LONG else 60):
        shutil.copytree(adapters["a1"], folder, dirs_exist_ok=True)
        file = folder / rng.choice(["adapter_config.json", "adapter_model.safetensors"])
        data = bytearray(file.read_bytes())
        place = rng.randrange(min(len(data), 1500))
        match rng.randrange(3):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randrange(1, 40)]
            case _:
                data[place:place] = rng.randbytes(rng.randrange(1, 8))
        file.write_bytes(data)
        try:
            engine.adapters.load("a", folder, replace=True)
        except PenstockError:
            refused += 1
    assert refused > 30
    row = made_prompts(1, 30, 512)[0]
    assert generate(engine, asked([row], [None], new=2))[0].error is None


def test_names_wrapped_otherwise(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    """An adapter of the bare model, without a head, and one whose tensors still name their adapter."""
    tensors = tensors_of(adapters["a0"])
    bare = write_adapter(tmp_path / "bare", {name.removeprefix("model."): t for name, t in tensors.items()})
    named = {name.replace(".weight", ".default.weight"): t for name, t in tensors.items()}
    with_name = write_adapter(tmp_path / "named", named)
    text = json.loads((adapters["a0"] / "adapter_config.json").read_text())
    assert (text["r"], text["lora_alpha"]) == (4, 8)
    row = made_prompts(1, 30, 512, seed=7)[0]
    engine = start(base, {"as": adapters["a0"], "bare": bare, "named": with_name})
    found = generate(engine, asked([row] * 3, ["as", "bare", "named"]))
    assert found[0].ids == found[1].ids == found[2].ids
