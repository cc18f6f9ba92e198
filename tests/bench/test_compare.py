"""`penstock bench compare` with real engines: Penstock and transformers, each behind its driver."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from penstock.bench.compare import Comparison, Job, Sample, markdown
from penstock.errors import UsageError
from tests.process import ROOT, check_error, penstock

DRIVERS = ROOT / "benchmarks" / "rivals"


@pytest.fixture
def rivals(tmp_path: Path) -> Path:
    """What make_rivals.py would write, for engines that this environment has, and one that cannot start."""
    folder = tmp_path / "rivals"
    folder.mkdir()
    entries = {
        "penstock": {"driver": str(DRIVERS / "drive_penstock.py"), "formats": ["fp32", "fp32+int8"]},
        "transformers": {"driver": str(DRIVERS / "drive_transformers.py"), "formats": ["fp32"]},
        "broken": {"driver": str(DRIVERS / "drive_nothing.py"), "formats": ["int4"]},
    }
    manifest = {name: {"python": sys.executable, "openmp": True, **entry} for name, entry in entries.items()}
    (folder / "rivals.json").write_text(json.dumps(manifest))
    return folder


def test_engines_take_turns(tiny_llama: Path, rivals: Path, tmp_path: Path) -> None:
    flags = ("--rivals", rivals, "--threads", "1", "-r", "1", "-j", "2x9+5", "-j", "1x20+1", "--json")
    done = penstock("bench", "compare", tiny_llama, *flags, home=tmp_path, timeout=150)
    assert done.returncode == 6, done.stderr.decode()  # one engine of four failed
    found = json.loads(done.stdout)
    assert list(found["versions"]) == ["penstock:fp32", "penstock:fp32+int8", "transformers:fp32"]
    assert "broken:int4 could not convert" in found["errors"]["broken:int4"]
    assert len(found["samples"]) == 3 * 2
    for sample in found["samples"]:
        assert sample["prefill_rate"] > 0
        assert (sample["decode_rate"] is None) == (sample["job"] == "1x20+1")
        assert (sample["read_share"] is None) == (sample["decode_rate"] is None or "transformers" in sample["engine"])
    assert len(found["limits"]) == 2
    assert found["weight_bytes"]["penstock:fp32"] == 4 * found["weight_bytes"]["penstock:fp32+int8"]


def test_ratios_are_of_one_round() -> None:
    """The machine is twice as fast in the second round: rates spread, ratios do not."""
    job = Job.parse("4x128+64")
    result = Comparison("m", 2, versions={"penstock:int4": "", "other:q4": ""})
    for number, speed in ((1, 1.0), (2, 2.0), (3, 1.5)):
        for engine, rate in (("penstock:int4", 30.0), ("other:q4", 20.0)):
            result.samples.append(Sample(engine, str(job), number, 500.0, rate * speed, 1.0, 0.5))
    lines = [line for line in markdown(result, [job]).splitlines() if line.startswith("| ")]
    head, ours, theirs = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert head == ["engine", "decode tokens/s", "weights' share of bandwidth", "penstock:int4 is x times as fast"]
    assert ours == ["penstock:int4", "45.0 (30.0-60.0)", "50.0 (50.0-50.0) %", "1.00 (1.00-1.00)"]
    assert theirs == ["other:q4", "30.0 (20.0-40.0)", "50.0 (50.0-50.0) %", "1.50 (1.50-1.50)"]


def test_no_rivals(tmp_path: Path) -> None:
    done = penstock("bench", "compare", "demo", "--rivals", tmp_path, home=tmp_path)
    check_error(done, 3, "no engines to compare", "make_rivals.py")


def test_unknown_engine(rivals: Path, tmp_path: Path) -> None:
    check_error(penstock("bench", "compare", "demo", "--rivals", rivals, "-e", "x", home=tmp_path), 2, "no engine 'x'")


def test_jobs() -> None:
    job = Job.parse("8x128+64")
    assert (job.streams, job.prompt, job.new, str(job)) == (8, 128, 64, "8x128+64")
    prompts = job.prompts(512, seed=3)
    assert prompts == job.prompts(512, seed=3) != job.prompts(512, seed=4)
    assert [len(prompt) for prompt in prompts] == [128] * 8
    assert all(0 <= token < 512 for prompt in prompts for token in prompt)
    for bad in ("8", "8x128", "0x1+1", "8x128+64 "):
        with pytest.raises(UsageError):
            Job.parse(bad)
