"""`penstock plan` as its users type it: no weights, no network, a report for people and one for programs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.plan_here import LAYER_CALLS, ROW_CALLS, processors
from penstock.cli.plan_model import describe_model
from penstock.devices.probe import MachineLimits
from penstock.plan.hardware import cpu_node, gpu
from penstock.plan.roofline import tokens_per_second
from tests.hub.fakehub import FakeHub
from tests.hub.gguf_files import write_gguf
from tests.process import check_error, penstock

NEEDED = ("weight_bytes", "kv_bytes_per_token", "fits", "max_sequences", "tokens_per_second", "sbatch")


def plan(home: Path, *args: str | Path) -> dict[str, Any]:
    """The report of a plan that works."""
    done = penstock("plan", *args, "--json", home=home, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr.decode()
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_a_known_model_on_a_card_offline(tmp_path: Path) -> None:
    report = plan(tmp_path, "llama-3-8b", "--gpu", "a100-80")
    assert all(key in report for key in NEEDED)
    assert report["weight_bytes"] == pytest.approx(8.030e9 * 2, rel=1e-3)
    assert report["kv_bytes_per_token"] == 131072
    assert report["fits"] is True
    assert report["gpus"] == 1
    assert any(option.startswith("--gres=gpu:") for option in report["sbatch"])
    assert report["formats"]["int4"]["weight_bytes"] < report["weight_bytes"] / 3


def test_published_measurements_show_their_error(tmp_path: Path) -> None:
    (row,) = plan(tmp_path, "meta-llama/Llama-2-7b-chat-hf", "--gpu", "a100-80", "--gpus", "1")["measured"]
    assert row["measured"] == 104.9
    assert row["error"] == pytest.approx(row["predicted"] / 104.9 - 1, abs=1e-3)
    assert abs(row["error"]) < 0.25


def test_a_folder_with_config_alone(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for name in ("model", "model/config.json"):
        report = plan(tmp_path, tmp_path / name, "--cpu", "--cores", "16", "--memory", "64")
        assert report["weight_bytes"] == pytest.approx(494e6 * 2, rel=1e-3)
        assert report["gpus"] == 0
        assert "--cpus-per-task=16" in report["sbatch"]


def test_a_hub_name_fetches_its_config_alone(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 512, "torch_dtype": "float32",
    }  # fmt: skip
    hub = FakeHub()
    hub.repos = {
        "org/small": {"config.json": json.dumps(config).encode(), "model.safetensors": b"x" * 1000},
        "org/gguf": {"model.gguf": b"GGUF"},
    }
    refused = {"org/gone": "There is no model 'org/gone'", "org/gguf": "penstock download org/gguf --file"}
    with hub.running():
        for name in ("org/small", *refused):
            done = penstock("plan", name, "--gpu", "l4", "--json", home=tmp_path, HF_ENDPOINT=hub.url)
            if name in refused:
                check_error(done, 4, refused[name])
            else:
                weights = 2 * (512 * 64) + 2 * (4 * 64**2 + 3 * 64 * 128) + 5 * 64
                assert json.loads(done.stdout)["weight_bytes"] == 4 * weights
    assert not [request for request in hub.requests if "safetensors" in request]


def test_a_gguf_file_and_its_real_size(tmp_path: Path, tiny_llama: Path) -> None:
    file = write_gguf(tiny_llama, tmp_path / "m.gguf", "Q8_0")
    report = plan(tmp_path, file, "--gpu", "v100-32")
    assert (report["from"], report["stored_format"]) == ("GGUF header", "q8_0")
    assert report["weight_bytes"] == pytest.approx(report["disk_bytes"], rel=0.05)


def test_a_site_chooses_partition_and_slice(tmp_path: Path) -> None:
    report = plan(tmp_path, "mistral-7b", "--site", "mila")
    assert report["gpu"] == "a100-80:2g.20gb"
    assert "--gres=gpu:a100l.2:1" in report["sbatch"]
    assert "--partition=long" in report["sbatch"]
    fixed = plan(tmp_path, "llama-2-70b-chat", "--site", "mila", "--gpu", "a100-80", "--partition", "short-unkillable")
    assert fixed["gpus"] == 2
    assert "--time=3:00:00" in fixed["sbatch"]
    nodes = plan(tmp_path, "llama-3-8b", "--site", "snellius", "--cpu")
    assert "--partition=rome" in nodes["sbatch"]


def test_what_does_not_fit_says_what_would(tmp_path: Path) -> None:
    done = penstock("plan", "llama-3-70b", "--gpu", "v100-32", "--gpus", "1", "--format", "float16", home=tmp_path)
    assert done.returncode == 0
    assert "fits         no" in done.stdout.decode()
    report = plan(tmp_path, "llama-3-70b", "--gpu", "v100-32", "--gpus", "1", "--format", "float16")
    assert (report["fits"], report["max_sequences"]) == (False, 0)


def test_this_machine(tmp_path: Path) -> None:
    report = plan(tmp_path, "demo", "--cpu", "--tokens", "512")
    assert report["fits"] is True
    assert report["tokens_per_second"] > 10
    assert report["disk_bytes"] == pytest.approx(report["weight_bytes"], rel=0.05)


def test_a_cache_of_fewer_bits(tmp_path: Path) -> None:
    half = plan(tmp_path, "llama-3-8b", "--gpu", "a100-80", "--kv-cache-dtype", "fp8_e4m3fn")
    assert (half["kv_bytes_per_token"], half["kv_cache_dtype"]) == (65536, "fp8_e4m3fn")
    node = ("--cpu", "--cores", "16", "--memory", "64")
    plain, small = (plan(tmp_path, "llama-3-8b", *node, *more) for more in ((), ("--kv-cache-dtype", "int8")))
    assert small["kv_bytes_per_token"] * 256 == plain["kv_bytes_per_token"] * 132  # a scale beside each 128 numbers
    assert small["batch_tokens_per_second"] > plain["batch_tokens_per_second"]


def test_the_table(tmp_path: Path) -> None:
    done = penstock("plan", "--table", home=tmp_path)
    assert done.returncode == 0
    assert "### bloomz (bigscience/bloomz, 176.2 B parameters)" in done.stdout.decode()
    rows = json.loads(penstock("plan", "--table", "--json", "--site", "mila", home=tmp_path).stdout)
    best = next(row for row in rows if row["model"] == "llama-2-70b-chat" and row["hardware"] == "a100-80")
    assert (best["gpus"], best["fits"]) == (2, True)


def test_a_report_of_the_benchmark_is_compared(tmp_path: Path) -> None:
    report = {
        "workload": {"sequence_length": 128, "decode_length": 32}, "weight_size": 1.0,
        "machine": {
            "threads": 2, "read_bytes_per_second": 4e10, "best_read": 5e10, "flops": {"int8": 2e12},
            "call_seconds": 5e-6,
        },
        "batches": [{"batch_size": 4, "throughput": {"Decode": {"average": 1000.0}}}],
    }  # fmt: skip
    (tmp_path / "bench.json").write_text(json.dumps(report))
    node = ("--cpu", "--cores", "2", "--memory", "16")
    rows = plan(tmp_path, "llama-3.2-1b", *node, "--measured", tmp_path / "bench.json")["measured"]
    assert [(row["measured"], row["source"], row["what"]) for row in rows] == [
        (1000.0, "bench.json", "batch 4, 144 tokens, int8")
    ]
    assert 50 < rows[0]["predicted"] < 4e10 / 1.2e9 * 4  # four rows a step that reads 1.2 GB
    assert rows[0]["error"] == pytest.approx(rows[0]["predicted"] / 1000 - 1, abs=1e-3)
    (tmp_path / "bench.json").write_text("{}")
    done = penstock("plan", "llama-3.2-1b", "--gpu", "l4", "--measured", tmp_path / "bench.json", home=tmp_path)
    check_error(done, 2, "bench static --json")


def test_calls_as_measured_here_are_part_of_a_step() -> None:
    """Each layer and row takes a number of them, and nothing else of a step changes with their speed."""
    shape = describe_model("demo", None, True).shape
    limits = MachineLimits(2, 40e9, 50e9, {"bfloat16": 1e12}, 4e-6)

    def step(calls: float, rows: int) -> float:
        device = processors(replace(limits, call_seconds=calls))
        return rows / tokens_per_second(shape, "bfloat16", device, 1, rows, 100)

    for rows in (1, 8):
        calls = shape.layers * LAYER_CALLS + rows * ROW_CALLS
        assert step(9e-6, rows) - step(4e-6, rows) == pytest.approx(calls * 5e-6)
    node = cpu_node(2, 2**34)
    assert node.row_seconds == gpu("a100-80").row_seconds == 0  # nobody measured theirs


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        ([], 2, "Which model?"),
        (["llama-3-8b", "--gpu", "a99"], 2, "no card 'a99'"),
        (["llama-3-8b", "--gpu", "a100", "--cpu"], 2, "exclude"),
        (["llama-3-8b", "--cores", "3"], 2, "--cpu"),
        (["llama-3-8b", "--gpu", "a100", "--kv-cache-dtype", "int8"], 2, "int8 KV cache is for processors"),
        (["llama-3-8b", "--cpu", "--cores", "3", "--kv-cache-dtype", "fp8_e5m2"], 2, "fp8 for GPUs"),
        (["llama-3-8b", "--gpu", "a100", "--format", "int3"], 2, "no format"),
        (["llama-3-8b", "--site", "mila", "--partition", "gone"], 2, "no partition 'gone'"),
        (["llama-3-8b", "--site", "fir", "--gpu", "v100-32"], 2, "has no v100-32"),
        (["org/nowhere", "--offline", "--gpu", "a100"], 3, "penstock download org/nowhere"),
        (["nowhere", "--gpu", "a100"], 4, "no model"),
    ],
)
def test_mistakes(tmp_path: Path, args: list[str], code: int, words: str) -> None:
    check_error(penstock("plan", *args, home=tmp_path), code, words)
