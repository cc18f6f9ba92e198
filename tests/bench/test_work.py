"""The arithmetic of steps against counting by hand, percentiles, and what the machine's limits are."""

from __future__ import annotations

import math
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from penstock.bench.statistics import Summary, percentile, table
from penstock.devices import counters
from penstock.devices.probe import MachineLimits, call_seconds, measure
from penstock.engine.messages import Stage
from penstock.engine.output import EngineStats, Totals
from penstock.engine.report import RunReport
from penstock.models.families import describe
from penstock.plan.work import StepCost, Work


@pytest.fixture(scope="module")
def cost(tiny_llama: Path) -> StepCost:
    config, _ = describe(tiny_llama)
    return StepCost.of(config, 2.0, 2)


def test_weights_of_a_step(tiny_llama: Path, cost: StepCost) -> None:
    """The matrices of the checkpoint, counted in its file."""
    from safetensors import safe_open

    with safe_open(tiny_llama / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    layers = sum(math.prod(s) for name, s in shapes.items() if len(s) == 2 and ".layers." in name)
    assert cost.weights == layers
    assert cost.head == math.prod(shapes["lm_head.weight"])
    assert cost.step([(1, 0)], scored=1).weight_bytes == 2 * (layers + cost.head)
    assert cost.step([(7, 0), (1, 90)], scored=0).weight_bytes == 2 * layers  # once, whatever the tokens


@pytest.mark.parametrize("window", [None, 5])
def test_attention_of_a_step(cost: StepCost, window: int | None) -> None:
    layers = sum(n for _, n in cost.spans)
    cost = replace(cost, spans=((window, layers),))
    draw = random.Random(0)
    for _ in range(50):
        length, before = draw.randint(1, 9), draw.randint(0, 20)
        seen = sum(min(before + i + 1, window or 10**9) for i in range(length))
        work = cost.step([(length, before)], scored=0)
        flops = work.flops - 2 * cost.weights * length
        assert flops == pytest.approx(cost.score_flops * layers * seen)
        read = len({j for i in range(length) for j in range(before + i + 1) if before + i - j < (window or 10**9)})
        assert work.kv_bytes == layers * cost.kv_size * (length + read)


def test_work_adds_up() -> None:
    assert Work(1, 2, 3) + Work(10, 20, 30) == Work(11, 22, 33)
    assert Work(1, 2, 3).bytes == 3


def test_percentiles_are_the_benchmark_tools() -> None:
    values = [float(n) for n in range(10)]
    assert [percentile(values, p) for p in (0, 50, 90, 99)] == [0, 5, 9, 9]
    assert percentile([4.0], 99) == 4.0
    s = Summary.of([3.0, 1.0, 2.0])
    assert (s.count, s.average, s.lowest, s.highest, s.p50, s.p99) == (3, 2.0, 1.0, 3.0, 2.0, 3.0)
    assert math.isnan(Summary.of([]).p50)


def test_table_is_markdown() -> None:
    assert table([["a", "bbb"], ["cc", ""]]).splitlines() == ["| a  | bbb |", "|----|-----|", "| cc |     |"]


def test_machine_limits() -> None:
    limits = measure(threads=1, seconds=0.05)
    assert limits.threads == 1
    assert 5e8 < limits.read_bytes_per_second <= limits.best_read < 1e12
    assert limits.flops["float32"] > 1e8
    assert limits.flops_of(4) == limits.flops["float32"]
    assert limits.flops_of(0.5625) == limits.flops.get("int8", limits.flops["float32"])
    assert 2e-7 < limits.call_seconds < 1e-3  # three calls from Python, and 32 KiB written


def test_a_call_is_more_than_its_parts() -> None:
    """Beside the same threads' work called alone, in the same process and taking turns with it."""
    shared = torch.zeros(torch.get_num_threads() * 32768, dtype=torch.uint8)

    def alone() -> float:
        since = time.perf_counter()
        for _ in range(500):
            shared.fill_(1)
        return (time.perf_counter() - since) / 500

    calls, parts = zip(*[(call_seconds(torch.get_num_threads(), 0.02), alone()) for _ in range(9)], strict=True)
    assert min(parts) < min(calls) < 20 * min(parts)


def test_two_measurements_make_one() -> None:
    later = MachineLimits(1, 50e9, 120e9, {"float32": 2e12}, 10e-6)
    assert later.beside(LIMITS) == MachineLimits(1, 75e9, 120e9, {"float32": 2e12}, (10e-6 + 5e-6) / 2)


def test_energy_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package counter that wraps around, beside one of a package's parts, which does not count twice."""
    for name, value in (("intel-rapl:0", 900), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{value}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("999\n")
    monkeypatch.setattr(counters, "_POWERCAP", tmp_path)
    meter = counters.EnergyMeter()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("100\n")
    assert meter.joules() == pytest.approx(200e-6)
    monkeypatch.setattr(counters, "_POWERCAP", tmp_path / "nothing")
    assert counters.EnergyMeter().joules() is None


LIMITS = MachineLimits(1, 100e9, 110e9, {"float32": 1e12}, 5e-6)


def report(start: float, busy: float, python: float, moved: float, flops: float, disk: int = 0) -> RunReport:
    totals = Totals(decode_seconds=busy, other_seconds=python, weight_bytes=moved, flops=flops)
    stats = EngineStats(prompt_tokens=100, generated_tokens=50, totals=totals)
    stages = [Stage("load", "", start)]
    return RunReport.of("m", stats, stages, start + busy + python, LIMITS, 1e12, disk, None)


@pytest.mark.parametrize(
    ("start", "busy", "python", "moved", "flops", "disk", "word"),
    [
        (9.0, 1.0, 0.1, 50e9, 0.1e12, 20_000_000_000, "Disk"),
        (9.0, 1.0, 0.1, 50e9, 0.1e12, 0, "The start"),
        (1.0, 9.0, 0.1, 720e9, 1e12, 0, "Memory bandwidth"),
        (1.0, 9.0, 0.1, 90e9, 7e12, 0, "Compute"),
        (1.0, 9.0, 10.0, 90e9, 7e12, 0, "Python"),
        (1.0, 9.0, 1.0, 9e9, 0.1e12, 0, "Python and small operations"),
    ],
)
def test_bottleneck(start: float, busy: float, python: float, moved: float, flops: float, disk: int, word: str) -> None:
    found = report(start, busy, python, moved, flops, disk)
    assert found.bottleneck.startswith(word)
    assert found.bottleneck.count("\n") == 0
    assert found.average_bytes_per_second == pytest.approx(moved / busy)
    assert found.tokens_per_minute == pytest.approx(60 * 150 / found.seconds)
    assert sum(found.seconds_by_stage.values()) == pytest.approx(found.seconds)
    assert found.bottleneck in found.text()
