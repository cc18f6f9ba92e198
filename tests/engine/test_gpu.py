"""What can be said of the GPU's side without a GPU: the sums of memory, the device that is chosen, the way to a loaded
engine with the card's numbers made up."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from penstock.devices import cuda
from penstock.engine.ahead import AheadLoop
from penstock.engine.config import EngineConfig
from penstock.engine.gpu import load_on_gpu
from penstock.engine.graphs import Captured, DecodeGraphs, usable_sizes
from penstock.engine.loop import EngineLoop
from penstock.engine.messages import Stage
from penstock.engine.open import open_model
from penstock.engine.request import EngineRequest
from penstock.engine.rows import DeviceRows
from penstock.errors import EnvironmentFault, ResourceError, UsageError
from penstock.kernels.attention import RunGroup, paged_attention
from penstock.models.lora import Adapter
from penstock.plan.memory import CARD_MARGIN, GIB, CardMemory, plan_card
from tests.encoder_decoders import SHAPES, save_encoder_decoder
from tests.engine.driver import generate
from tests.vision.models import save_vision

CPU = torch.device("cpu")
KIB = 1024


def card(**numbers: int) -> CardMemory:
    return CardMemory(**{"total": 100 * GIB, "free": 80 * GIB, "held": 20 * GIB, "step": GIB, "graphs": GIB, **numbers})


def test_a_card_is_shared_out_to_the_last_block() -> None:
    reserve = GIB + GIB // 10 + GIB + CARD_MARGIN
    plan = plan_card(card(), 0.9, 128 * KIB, 16, None, None)
    assert plan.kv_bytes <= 70 * GIB - reserve < plan.kv_bytes + 16 * 128 * KIB
    assert plan.num_blocks * 16 * 128 * KIB == plan.kv_bytes
    beside_another = plan_card(card(free=30 * GIB), 0.9, 128 * KIB, 16, None, None)  # which holds 50 GiB
    assert beside_another.kv_bytes <= 30 * GIB - reserve < beside_another.kv_bytes + 16 * 128 * KIB
    assert plan_card(card(), 0.9, 128 * KIB, 16, 4 * GIB, None).kv_bytes == 4 * GIB
    assert plan_card(card(), 0.9, 128 * KIB, 16, None, 1000).num_blocks == 62


@pytest.mark.parametrize(("kv_bytes", "tokens"), [(68 * GIB, None), (None, 2**30), (None, None)])
def test_too_little_of_a_card_is_refused_with_the_sums(kv_bytes: int | None, tokens: int | None) -> None:
    full = card(held=95 * GIB, free=5 * GIB) if kv_bytes is tokens is None else card()
    with pytest.raises(ResourceError) as refused:
        plan_card(full, 0.9, 128 * KIB, 16, kv_bytes, tokens)
    assert len(str(refused.value).splitlines()) <= 6
    assert "--cuda-memory-fraction" in refused.value.why


def test_the_device_is_chosen_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "cards", lambda: [])
    assert cuda.choose_device("auto") == cuda.choose_device("cpu") == CPU
    with pytest.raises(EnvironmentFault) as refused:
        cuda.choose_device("cuda")
    assert refused.value.why
    for name in ("gpu", "cuda:", "cuda:x", "cuda:-1", "mps", ""):
        with pytest.raises(UsageError):
            cuda.choose_device(name)
    one = cuda.Card(0, "A card", 100 * GIB, "9.0", "CUDA 13.0")
    monkeypatch.setattr(cuda, "cards", lambda: [one, one])
    assert cuda.choose_device("auto") == cuda.choose_device("cuda") == torch.device("cuda", 0)
    assert cuda.choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(EnvironmentFault, match="no GPU for --device cuda:2"):
        cuda.choose_device("cuda:2")


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processor, which says that it is a card with 64 MiB, and counts 4 MiB for any step. Appends to a list what it
    was asked to measure."""
    measured: list[int] = []

    def peak(work: Callable[[], None]) -> int:
        work()
        measured.append(1)
        return 4 * 2**20

    monkeypatch.setattr(cuda, "free_and_total", lambda device: (600 * 2**20, 640 * 2**20))
    monkeypatch.setattr(cuda, "describe", lambda device: "a made-up card")
    monkeypatch.setattr(cuda, "peak_bytes", peak)
    monkeypatch.setattr(cuda, "give_back", lambda: None)
    return measured


def test_loading_measures_and_fills_the_card(tiny_llama: Path, a_card: list[int]) -> None:
    stages: list[Stage] = []
    options = {"dtype": "float32", "max_batch_size": 6, "max_batch_prefill_tokens": 80}
    loop = load_on_gpu(EngineConfig(str(tiny_llama), **options), CPU, stages.append)  # type: ignore[arg-type]
    assert isinstance(loop, AheadLoop)
    assert [stage.name for stage in stages] == ["device", "model", "load", "dry step", "KV memory", "warm"]
    assert len(a_card) == 2
    stats = loop.current_stats()
    assert (stats.used_blocks, stats.steps, stats.generated_tokens) == (0, 0, 0)
    assert not loop.has_work
    kv = loop.limits.num_blocks * 16 * 2 * 3 * 2 * 16 * 4
    assert 200 * 2**20 < kv < 600 * 2**20 - CARD_MARGIN
    requests = [EngineRequest(i, [5 + i] * 9, 6, ignore_eos=True) for i in range(9)]
    plain = EngineLoop.load(EngineConfig(str(tiny_llama), device="cpu", **options))  # type: ignore[arg-type]
    assert generate(loop, requests) == generate(plain, requests)


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_a_cache_of_eight_bits(tiny_llama: Path, a_card: list[int], dtype: str) -> None:
    """Half the bytes a token of 16 bits takes, and nearly the same scores."""
    found = {}
    for kv_cache_dtype in (None, dtype):
        config = EngineConfig(str(tiny_llama), dtype="bfloat16", kv_cache_dtype=kv_cache_dtype, max_batch_size=4)
        loop = load_on_gpu(config, CPU, lambda stage: None)
        request = EngineRequest(0, [5, 6, 7, 8] * 5, 1, logprobs=True, ignore_eos=True)
        found[kv_cache_dtype] = loop.limits.num_blocks, generate(loop, [request])[0].logprobs[0]
    assert found[dtype][0] == pytest.approx(2 * found[None][0], rel=0.01)
    assert found[dtype][1] == pytest.approx(found[None][1], abs=0.3)
    assert found[dtype][1] != found[None][1]


@pytest.mark.parametrize("kind", ["t5", "llava"])
def test_other_models_are_loaded_where_they_compute(kind: str, tmp_path: Path, a_card: list[int]) -> None:
    """Weights, tower and cache, within the card's memory; the device here is one that holds no numbers."""
    folder, there = tmp_path / kind, torch.device("meta")
    if kind == "t5":
        save_encoder_decoder(folder, SHAPES["t5"])
    else:
        save_vision(folder, kind)
    stages: list[Stage] = []
    config = EngineConfig(str(folder), dtype="float32", dummy_weights=True, max_total_tokens=64)
    model = open_model(config, stages.append, there)
    assert [stage.name for stage in stages] == ["device", "model", "KV memory", "load"]
    assert model.decoder.device == there
    assert {x.device for layer in model.cache for x in layer} == {there}
    assert model.limits.num_blocks * 16 >= 64
    if kind == "llava":
        assert model.tower is not None
        arrays = {"pixel_values": torch.zeros(1, 3, 28, 28)}
        seen = model.tower(arrays)
        assert seen.device == there


def test_a_cache_that_holds_no_sequence_is_refused(tiny_llama: Path, a_card: list[int]) -> None:
    with pytest.raises(UsageError, match="less than one sequence"):
        load_on_gpu(
            EngineConfig(str(tiny_llama), max_total_tokens=400, max_batch_total_tokens=320), CPU, lambda stage: None
        )


def test_sizes_of_captured_batches() -> None:
    assert usable_sizes((1, 2, 4, 8), 6) == (1, 2, 4, 6)
    assert usable_sizes((4, 1, 2), 100) == (1, 2, 4)
    assert usable_sizes((), 8) == usable_sizes((0,), 8) == ()


def captured_sizes(graphs: DecodeGraphs) -> list[tuple[int, bool, Adapter | None]]:
    """What is captured from now on, and is given back by its size."""
    made: list[tuple[int, bool, Adapter | None]] = []

    def captured(size: int, alone: bool, adapter: Adapter | None) -> Captured:
        made.append((size, alone, adapter))
        nothing = torch.zeros(0)
        return Captured(None, size, nothing, (nothing,) * 3)  # type: ignore[arg-type]

    graphs._captured = captured  # type: ignore[method-assign]
    return made


def size_of(graph: Captured | None) -> int | None:
    return None if graph is None else graph.size


def test_a_batch_takes_the_next_size_once_it_is_worth_it() -> None:
    graphs = DecodeGraphs(lambda *inputs: inputs[:3], DeviceRows(16, 4, 16, CPU), (1, 4, 16))
    made = captured_sizes(graphs)
    assert [size_of(graphs.find(n)) for n in (3, 4, 2, 3, 1)] == [None, None, 4, 4, None]
    assert graphs.find(17) is None
    assert made == [(4, False, None)]
    assert graphs.capture_next()
    assert not graphs.capture_next()
    assert [size for size, _alone, _adapter in made] == [4, 1, 16]
    assert not graphs.capture_next()


def test_steps_that_compute_otherwise_have_graphs_of_their_own() -> None:
    graphs = DecodeGraphs(lambda *inputs: inputs[:3], DeviceRows(16, 4, 16, CPU), (2, 4))
    made = captured_sizes(graphs)
    first, second = Adapter([]), Adapter([])
    assert [size_of(graphs.find(1, alone=True)) for _ in range(3)] == [None, None, 1]
    assert [size_of(graphs.find(3, adapter=first)) for _ in range(3)] == [None, None, 4]
    assert [size_of(graphs.find(2, adapter=second)) for _ in range(3)] == [None, None, 2]
    assert [size_of(graphs.find(2, adapter=first)) for _ in range(9)] == [None] * 9  # as many as there are sizes
    assert made == [(1, True, None), (4, False, first), (2, False, second)]
    made.clear()
    del second  # unloaded, and its last sequence has ended
    assert [size_of(graphs.find(2, adapter=first)) for _ in range(2)] == [2, 2]


def test_a_step_that_cannot_be_captured_is_run_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    graphs = DecodeGraphs(lambda *inputs: inputs[:3], DeviceRows(16, 4, 16, CPU), (4,))
    tries = []

    def captured(*arguments: object) -> Captured:
        tries.append(arguments)
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphs._captured = captured  # type: ignore[method-assign]
    with caplog.at_level(logging.CRITICAL):
        assert [graphs.find(4) for _ in range(6)] == [None] * 6
    assert len(tries) == 1
    assert not graphs.capture_next()


def test_a_processors_runs_are_a_gpus() -> None:
    """What is built for a processor and computed a step at a time on a card."""
    torch.manual_seed(0)
    q, cache = torch.randn(7, 4, 16), [torch.randn(9, 2, 4, 16) for _ in range(2)]
    groups = [
        RunGroup(0, 1, [5, 9, 3], torch.tensor([[1, 2, 2], [3, 4, 5], [6, 6, 6]])),
        RunGroup(3, 2, [6, 2], torch.tensor([[7, 8], [0, 0]])),
    ]
    expected = paged_attention(q, *cache, groups, 0.25, 4)
    there = [group.on(CPU, 4) for group in groups]
    assert all(group.on(CPU, 4) is paged for group, paged in zip(groups, there, strict=True))  # once a step
    assert all(paged.fixed_splits for paged in there)  # whoever else is in the step
    torch.testing.assert_close(paged_attention(q, *cache, there, 0.25, 4), expected)


def test_padding_reads_and_writes_nothing() -> None:
    """Rows that fill a batch up to a captured size have no place in the cache."""
    rows = DeviceRows(4, 3, 16, CPU)
    ids, index, contexts = torch.tensor([7, -1, 0]), torch.tensor([1, 2, 4]), torch.tensor([20, 1, 0])
    rows.tokens[2] = 9
    rows.tables[1] = torch.tensor([5, 6, 7])
    step = rows.decoding(ids, index, contexts)
    assert step.ids.tolist()[:2] == [7, 9]
    assert step.positions.tolist() == [19, 0, 0]
    assert step.slots.tolist() == [6 * 16 + 3, 0, -1]
    assert len(step.groups) == 2  # one each, none for the padding


@pytest.mark.parametrize(("model_type", "ahead"), [("llama", True), ("t5", False), ("xglm", False), ("llava", False)])
def test_a_gpu_runs_every_kind_of_model(
    model_type: str, ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoders of text a step ahead, all others a step at a time."""
    there = torch.device("cuda", 0)
    monkeypatch.setattr(cuda, "cards", lambda: [cuda.Card(0, "A card", GIB, "9.0", "CUDA 13.0")])
    asked: list[tuple[bool, torch.device]] = []

    def stop(ahead: bool, device: torch.device) -> None:
        asked.append((ahead, device))
        raise ResourceError("enough")

    monkeypatch.setattr("penstock.engine.gpu.load_on_gpu", lambda config, device, on_stage: stop(True, device))
    monkeypatch.setattr("penstock.engine.loop.open_model", lambda config, on_stage, device: stop(False, device))
    config = {"model_type": model_type}
    if model_type == "llava":
        config |= {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for device in ("auto", "cuda", "cpu"):
        with pytest.raises(ResourceError, match="enough"):
            EngineLoop.load(EngineConfig(str(tmp_path), device=device))
    assert asked == [(ahead, there), (ahead, there), (False, CPU)]
