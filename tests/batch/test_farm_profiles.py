"""Partitions that run the farm in their own way, and what of that belongs to the farm's identity."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from penstock.batch.farm import local
from penstock.batch.farm.ledger import Ledger
from penstock.batch.farm.manifest import ModelCopy, Profile, parse_profiles, parse_settings, text_deciding
from penstock.batch.farm.submission import shapes
from penstock.cluster.script import Resources
from penstock.cluster.workers import script
from penstock.errors import UsageError
from tests.batch.farms import life_command, make_farm
from tests.process import ROOT


def test_profiles_from_the_command_line() -> None:
    found = parse_profiles(["gpu:quantize=int8,max-batch-size=64,gpus=1,time=2:00:00", "cpu: threads = 4"])
    assert found["gpu"] == Profile(quantize="int8", max_batch_size=64, gpus="1", time="2:00:00")
    assert found["gpu"].engine_options() == {"quantize": "int8", "max_batch_size": 64}
    assert found["cpu"].threads == 4
    assert parse_profiles(["gpu:gpus=a100:2"])["gpu"].gpus == "a100:2"
    assert parse_profiles(["gpu:gpus=0", "gpu:threads=2"])["gpu"] == Profile(gpus="0", threads=2)
    wrong = ("quantize=q4", "dtype=half", "threads=0", "cpus=-1", "max-batch-size=0", "memory-fraction=7", "gpus=many")
    for text in (
        "gpu",
        "gpu:",
        ":threads=1",
        "gpu:threads",
        "gpu:threads=few",
        "gpu:speed=1",
        *(f"g:{w}" for w in wrong),
    ):
        with pytest.raises(UsageError, match="--profile"):
            parse_profiles([text])


def test_only_what_changes_the_text_is_part_of_the_farms_identity() -> None:
    model = ModelCopy(name="m", path="/m", sha256="1")
    small = ModelCopy(name="s", path="/s", sha256="2")
    assert text_deciding({"": model}, {"": Profile(quantize="int8"), "cpu": Profile(threads=2, cpus=8)}) == {}
    decided = text_deciding({"": model, "old": small}, {"cpu": Profile(quantize="int8"), "old": Profile(model="s")})
    assert decided == {"cpu": {"quantize": "int8"}, "old": {"model_sha256": "2"}}


def test_the_job_of_a_partition(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 4)
    profiles = {"gpu": Profile(gpus=2, time="1:00:00", max_batch_size=9), "": Profile(threads=3)}
    spool.manifest = msgspec.structs.replace(spool.manifest, profiles=profiles)
    assert spool.manifest.profile("gpu").engine_options() == {"max_batch_size": 9, "threads": 3}
    common = Resources(time="30", cpus=2, account="mine")
    gpu, cpu = shapes(spool, {"gpu": 3, "cpu": 1}, common, True, "generic")
    text = script(gpu)
    for line in ("--partition=gpu", "--time=1:00:00", "gpu:2", "--array=0-2", "--requeue", "--signal=USR1@120"):
        assert line in text
    assert "stage " in text
    assert "--account=mine" in text
    assert "--time=30\n" in script(cpu)
    assert "gpu:" not in script(cpu)
    assert "--partition gpu --settings max-batch-size=9,threads=3 " in text


def test_what_does_not_change_the_text_is_as_it_is_asked_for_now(tmp_path: Path) -> None:
    manifest = make_farm(tmp_path, 4).manifest
    manifest = msgspec.structs.replace(manifest, profiles={"": Profile(quantize="int8"), "gpu": Profile(gpus=9)})
    now = manifest.adjusted({"gpu": Profile(gpus=1, max_batch_size=4), "cpu": Profile(threads=2)})
    assert now.profile("gpu") == Profile(quantize="int8", gpus=1, max_batch_size=4)
    assert now.profile("gpu").settings() == "max-batch-size=4"  # numbers decide the text; they stay
    assert parse_settings(now.profile("cpu").settings()) == Profile(threads=2)
    assert parse_settings("") == Profile()


def test_a_job_with_several_cards_has_a_process_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = make_farm(tmp_path, 64)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(local, "_command", lambda spool, partition, life, rank, place: life_command(spool, life, 0.2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert local.supervise(spool, "gpu", 0, []) == 0
    ledger = Ledger(spool)
    ledger.update()
    assert ledger.rows == 64
    assert [life.begin.place.gpus for life in ledger.lives.values()] == [1, 1]
