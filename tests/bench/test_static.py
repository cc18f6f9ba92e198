"""`penstock bench static` and `text-generation-benchmark` as people run them."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.process import check_error, command, environment, penstock

SMALL = ("-b", "1", "-b", "3", "-s", "12", "-d", "5", "-r", "4", "--no-limits", "--threads", "1")


def rows(block: str) -> list[list[str]]:
    """The cells of a Markdown table, whose columns must be aligned."""
    lines = block.strip().splitlines()
    assert len({len(line) for line in lines}) == 1, block
    assert set(lines[1]) <= set("|-"), block
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]


def test_tables(tiny_llama: Path, tmp_path: Path) -> None:
    done = penstock("bench", "static", tiny_llama, *SMALL, "--csv", tmp_path / "o.csv", home=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    parameters, latency, throughput = (rows(block) for block in done.stdout.decode().split("\n\n"))
    assert ["Sequence Length", "12"] in parameters
    assert ["Top K", "None"] in parameters
    assert ["Do Sample", "false"] in parameters
    assert latency[0] == ["Step", "Batch Size", "Average", "Lowest", "Highest", "p50", "p90", "p99"]
    assert [row[0] for row in latency[1:]] == ["Prefill", "", "Decode (token)", "", "Decode (total)", ""]
    assert [row[1] for row in latency[1:]] == ["1", "3"] * 3
    for row in latency[1:]:
        values = [float(cell.removesuffix(" ms")) for cell in row[2:]]
        average, lowest, highest, p50, p90, p99 = values
        assert 0 < lowest <= p50 <= p90 <= p99 <= highest
        assert lowest <= average <= highest
    assert throughput[0] == ["Step", "Batch Size", "Average", "Lowest", "Highest"]
    assert [row[0] for row in throughput[1:]] == ["Prefill", "", "Decode", ""]
    assert all(cell.endswith(" tokens/secs") for row in throughput[1:] for cell in row[2:])
    with (tmp_path / "o.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["count"] for line in lines} == {"4"}
    assert [line["batch_size"] for line in lines] == ["1"] * 5 + ["3"] * 5


def test_json_with_the_machines_limits(tiny_llama: Path, tmp_path: Path) -> None:
    done = penstock(
        "bench", "static", tiny_llama, "-b", "2", "-s", "16", "-d", "9", "-r", "3", "--json", "--report",
        "--threads", "1", "--top-k", "5", home=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    (batch,) = found["batches"]
    total, token = batch["latency"]["Decode (total)"], batch["latency"]["Decode (token)"]
    assert total["average"] == pytest.approx(8 * token["average"])
    lowest = batch["latency"]["Prefill"]["lowest"]
    assert batch["throughput"]["Prefill"]["highest"] == pytest.approx(2 * 16 / (lowest / 1e3))
    assert found["machine"]["read_bytes_per_second"] > 0
    assert found["flops_limit"] > 0
    assert found["workload"]["sampling"]["top_k"] == 5
    # 8 decode steps read every matrix once each
    seconds = total["average"] / 1e3
    assert batch["decode_bytes_per_second"] * seconds > 8 * 4 * (3 * (64 * 128 * 3 + 64 * 64 * 3) + 512 * 64)
    report = found["report"]
    assert (report["prompt_tokens"], report["generated_tokens"]) == (4 * 2 * 16, 4 * 2 * 9)
    assert report["bottleneck"] in done.stderr.decode()


def test_dummy_weights_need_a_config_alone(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shape"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    check_error(penstock("bench", "static", folder, *SMALL, home=tmp_path), 4, "no *.safetensors")
    done = penstock("bench", "static", folder, *SMALL, "--dummy-weights", "--quantize", "int4", "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert len(json.loads(done.stdout)["batches"]) == 2
    assert "random weights" in done.stderr.decode()


def test_the_name_that_tgi_uses(tiny_llama: Path, tmp_path: Path) -> None:
    module = "penstock.cli.bench_static"
    flags = ("-t", tiny_llama, "-m", "/tmp/text-generation-server-0", *SMALL)  # noqa: S108
    script = f"import sys; from {module} import main; main()"
    done = subprocess.run(
        [*command()[:1], "-c", script, *map(str, flags)],
        env=environment(tmp_path, TOP_N_TOKENS="2", SEQUENCE_LENGTH="99"),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    parameters = rows(done.stdout.decode().split("\n\n")[0])
    assert ["Top N Tokens", "Some(2)"] in parameters
    assert ["Sequence Length", "12"] in parameters  # the flag goes before the environment
    assert "no effect" in done.stderr.decode()


def test_one_new_token_is_no_decode(tiny_llama: Path, tmp_path: Path) -> None:
    done = penstock("bench", "static", tiny_llama, "-d", "1", home=tmp_path)
    assert done.returncode == 2
    assert b"at least 2" in done.stderr


def test_ctrl_c_prints_what_is_done(tiny_llama: Path, tmp_path: Path) -> None:
    args = command(
        "bench", "static", tiny_llama, "-b", "1", "-b", "2", "-d", "20", "-r", "5000", "--threads", "1", "--no-limits"
    )
    with subprocess.Popen(args, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith(b"warm"):
                break
        time.sleep(1.5)
        os.kill(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=30)
    assert process.returncode == 130, error.decode()
    latency = rows(out.decode().split("\n\n")[1])
    assert [row[1] for row in latency[1:]] == ["1"] * 3
