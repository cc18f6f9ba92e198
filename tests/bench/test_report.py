"""`--report` on a run of prompts and at a server's end, and what the engine counts for it."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest
from tests.process import penstock
from tests.server.running import start


def test_generate(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("the quick\nbrown fox jumps\n")
    flags = ("-i", "p.txt", "-o", "o.jsonl", "--max-new-tokens", "6", "--ignore-eos", "--threads", "1")
    done = penstock("generate", tiny_llama, *flags, "--report", "--json", home=tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads(done.stdout)["report"]
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert report["prompt_tokens"] == sum(row["prompt_tokens"] for row in rows)
    assert report["generated_tokens"] == 12
    assert sum(report["seconds_by_stage"].values()) == pytest.approx(report["seconds"], rel=0.02)
    assert {"load", "warm", "prompts", "decoding", "choosing", "outside"} <= set(report["seconds_by_stage"])
    assert 0 < report["average_bytes_per_second"] <= report["peak_bytes_per_second"]
    assert 0 < report["average_flops_per_second"] <= report["peak_flops_per_second"]
    assert report["bytes_share"] == pytest.approx(report["average_bytes_per_second"] / report["bytes_limit"])
    text = done.stderr.decode()
    for name in ("tokens", "seconds", "disk", "moved", "memory", "compute", "energy", "bottleneck"):
        assert f"\n{name} " in text, text
    without = penstock("generate", tiny_llama, *flags, "--overwrite", "--json", home=tmp_path, cwd=tmp_path)
    assert json.loads(without.stdout)["report"] is None
    assert b"bottleneck" not in without.stderr


def test_server(tiny_llama: Path, tmp_path: Path) -> None:
    server = start(tmp_path, tiny_llama, "--threads", "1", "--report")
    try:
        body = {"inputs": "the quick brown fox", "parameters": {"max_new_tokens": 7}}
        made = server.ask("POST", "/generate", {**body, "parameters": {"max_new_tokens": 7, "details": True}}).json()
        metrics = server.ask("GET", "/metrics").text
        assert "penstock_weight_bytes_total " in metrics
        assert "penstock_flops_total " in metrics
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    finally:
        server.kill()
    assert f", {made['details']['generated_tokens']} out; " in server.errors
    assert "\nbottleneck " in server.errors


def test_the_engine_counts_its_work(tiny_llama: Path) -> None:
    """Whatever the order of the steps, the same tokens cost the same arithmetic; batching reads fewer weights."""
    work = []
    for rows in (1, 4):
        engine = EngineLoop.load(
            EngineConfig(
                str(tiny_llama), max_batch_size=rows, max_batch_total_tokens=1024, prefix_caching=False, threads=1
            )
        )
        assert engine.stats.totals.work.flops == 0  # warming up does not count
        for i in range(4):
            engine.add(EngineRequest(i, [5, 6, 7, 8 + i], 5, ignore_eos=True))
        while engine.has_work:
            engine.step()
        totals = engine.stats.totals
        assert totals.prompt_seconds > 0
        assert totals.decode_seconds > 0
        assert totals.other_seconds > 0
        work.append(totals.work)
    alone, together = work
    assert alone.flops == together.flops
    assert alone.kv_bytes == together.kv_bytes
    assert alone.weight_bytes == pytest.approx(4 * together.weight_bytes)
