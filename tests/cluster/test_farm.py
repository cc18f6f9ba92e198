"""Farms on a real Slurm: submitted, looked at, disturbed, cancelled, resumed; each prompt answered exactly once."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.cluster.workers import elements
from tests.cluster.chaos import ENGINE, Chaos, check, rampage, reference, write_prompts
from tests.cluster.slurm import Cluster
from tests.process import check_error


@pytest.fixture
def chaos(cluster: Cluster, tmp_path: Path) -> Iterator[Chaos]:
    found = Chaos(cluster, tmp_path, random.Random(3))
    yield found
    found.end_duplicates()
    if found.farm.exists():
        found.run("farm", "cancel", found.farm)
    until = time.monotonic() + 30
    while found.has_jobs() and time.monotonic() < until:
        time.sleep(0.3)


def status(chaos: Chaos) -> Any:
    return json.loads(chaos.checked("farm", "status", chaos.farm, "--json"))


def wait_for(chaos: Chaos, rows: int, seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while (found := status(chaos))["done"] < rows:
        assert time.monotonic() < until, found
        time.sleep(0.3)
    return found


def test_a_thousand_prompts_through_twenty_events(chaos: Chaos) -> None:
    """Three partitions; workers are killed, requeued, preempted, doubled, told to go and cut off from the disk. The
    status is true at every look (`rampage` asserts it), and the answers are those of one undisturbed process."""
    prompts = chaos.home / "p.txt"
    write_prompts(prompts, 1000)
    chaos.submit(prompts, 48, "main:2,low:1,brief:1", 4)
    assert rampage(chaos, 20, 0.25, time.monotonic() + 120, rare=("preempt",))
    assert sum(chaos.events.values()) >= 8, chaos.events
    check(chaos, reference(chaos, prompts, 48))
    found = status(chaos)
    assert (found["done"], found["failed"], found["aside"]) == (1000, 0, 0)
    assert {group["name"] for group in found["partitions"]} <= {"main", "low", "brief"}
    stats = json.loads((chaos.farm / "stats.json").read_text())  # --stats: merge wrote it
    assert stats["tokens"] == found["tokens"]
    assert stats["lost"]["queue"] > 0


def test_cancelled_resumed_and_joined(chaos: Chaos) -> None:
    prompts = chaos.home / "p.txt"
    write_prompts(prompts, 4000)
    args = ("-i", prompts, "-m", "demo", "-o", chaos.farm, "--max-new-tokens", "64", "--lease", "6", *ENGINE)
    plan = ("--partitions", "main", "--workers", "2", "--cpus", "1")
    shown = chaos.checked("farm", "submit", *args, *plan, "--dry-run").decode()
    assert "#SBATCH --array=0-1" in shown
    assert "--export=NONE" in shown
    (job,) = json.loads(chaos.checked("farm", "submit", *args, *plan, "--stage", "--json"))
    assert (job["partition"], job["workers"]) == ("main", 2)
    found = wait_for(chaos, 50)
    assert found["jobs_running"] >= 1
    assert not found["complete"]
    lost = json.loads(chaos.checked("farm", "report", chaos.farm, "--json"))["lost"]
    assert lost["staging"] > 0  # each node copied the model to its RAM disk first
    chaos.checked("farm", "cancel", chaos.farm)
    until = time.monotonic() + 60
    while chaos.has_jobs():
        assert time.monotonic() < until
        time.sleep(0.2)
    done = status(chaos)["done"]
    check_error(chaos.run("farm", "submit", *args, *plan), 2, "was cancelled")
    (again,) = json.loads(chaos.checked("farm", "resume", chaos.farm, "--json"))
    assert again["job"] != job["job"]
    assert json.loads(chaos.checked("farm", "resume", chaos.farm, "--json")) == []  # they are there already
    found = wait_for(chaos, done + 50)
    assert found["repeated"] == 0  # what was cancelled had been handed back
    changed = chaos.run("farm", "submit", *args[:7], "65", *args[8:], *plan)
    check_error(changed, 2, "max_new_tokens: 64, now 65")


def test_mistakes(chaos: Chaos) -> None:
    prompts = chaos.home / "p.txt"
    write_prompts(prompts, 3)
    args = ("-i", prompts, "-m", "demo", "-o", chaos.farm, "--workers", "2")
    check_error(chaos.run("farm", "submit", *args, "--partitions", "gpus"), 2, "no partition 'gpus'", "main")
    check_error(chaos.run("farm", "submit", *args, "--partitions", "main:3"), 2, "contradict")
    check_error(chaos.run("farm", "submit", *args, "--partitions", "main", "--time", "soon"), 2, "--time 'soon'")
    check_error(chaos.run("farm", "submit", *args, "--profile", "mian:threads=1"), 2, "no partition 'mian'", "main")
    check_error(chaos.run("farm", "submit", *args, "--profile", "main:quantize=q4"), 2, "quantize", "int4")
    chaos.checked("farm", "submit", *args, "--profile", "main:quantize=int4", "--dry-run")  # it decides nothing
    assert not chaos.farm.exists()


def test_partitions_that_differ(chaos: Chaos) -> None:
    """Each partition computes with its own numbers and batch; what Slurm refuses can be asked for again, rightly."""
    prompts = chaos.home / "p.txt"
    write_prompts(prompts, 4000)
    args = ("-i", prompts, "-m", "demo", "-o", chaos.farm, "--max-new-tokens", "32", "--shard-rows", "16", *ENGINE)
    own = ["--profile=main:quantize=int8,cpus=2", "--profile=low:quantize=int4,max-batch-total-tokens=8192,cpus=1"]
    three = ("--partitions", "main:1,low:1,brief:1", "--workers", "3")
    refused = chaos.run("farm", "submit", *args, *three, *own, "--profile=brief:dtype=float32,gpus=9")
    check_error(refused, 2, "Slurm refuses")
    assert "workers in main: 1" in refused.stderr.decode()  # which work already
    plan = (
        "--partitions",
        "brief:1",
        "--workers",
        "1",
        *own,
        "--profile=brief:dtype=float32,max-batch-total-tokens=4096,gpus=0",
    )
    late = chaos.run("farm", "submit", *args, *plan, "--time", "5:00")
    assert "WARNING: brief: 1 wait, PartitionConfig" in late.stderr.decode()
    chaos.checked("farm", "submit", *args, *plan, "--time", "1:00")
    until = time.monotonic() + 90
    while {group["name"] for group in status(chaos)["partitions"] if group["rows"]} != {"main", "low", "brief"}:
        assert time.monotonic() < until, status(chaos)
        time.sleep(0.3)
    logs = "".join(file.read_text() for file in (chaos.farm / "logs").iterdir())
    for said in ("in int8", "in int4", "decoder in float32", "KV 16384 ", "KV 8192 ", "KV 4096 "):
        assert said in logs, logs
    chaos.run("farm", "merge", chaos.farm, "--partial")
    answers = [json.loads(line) for line in (chaos.farm / "output.jsonl").read_text().splitlines()]
    assert {answer["profile"] for answer in answers} == {"main", "low", "brief"}


@pytest.mark.parametrize(
    ("name", "count"), [("17", 1), ("17_4", 1), ("17_[4]", 1), ("17_[0-3]", 4), ("17_[0-3,7%2]", 5), ("17_[1,3]", 2)]
)
def test_what_squeue_shows_as_one_job(name: str, count: int) -> None:
    assert elements(name) == count
