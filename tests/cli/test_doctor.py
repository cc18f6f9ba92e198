"""`penstock doctor`: every check with a verdict, no secrets, and the exit code."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.process import command, environment, penstock

NAMES = [
    "penstock", "torch", "packages", "processor", "cores", "memory", "gpus", "cache", "token", "temporary", "shm",
    "files", "slurm",
]  # fmt: skip


def test_the_report_for_programs(tmp_path: Path) -> None:
    done = penstock("doctor", "--quick", "--json", home=tmp_path, HF_TOKEN="hf_secretsecret")
    report = json.loads(done.stdout)
    assert (done.returncode, report["ok"]) == (0, True)
    assert [check["name"] for check in report["checks"]] == NAMES
    checks = {check["name"]: check for check in report["checks"]}
    assert {check["status"] for check in checks.values()} <= {"ok", "warn"}
    assert "$HF_TOKEN" in checks["token"]["text"]
    assert b"hf_secretsecret" not in done.stdout + done.stderr
    assert str(tmp_path / "hf" / "hub") in checks["cache"]["text"]
    assert int(checks["cores"]["text"].split()[0]) == len({*os.sched_getaffinity(0)})


def test_warnings_have_a_cure(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_secretsecret")
    (tmp_path / "hf" / "token").chmod(0o644)
    done = penstock("doctor", "--quick", home=tmp_path)
    text = done.stdout.decode()
    assert done.returncode == 0
    assert "warn token" in text
    assert f"cure: chmod 600 {tmp_path / 'hf' / 'token'}" in text
    assert "hf_secretsecret" not in text


def test_a_broken_torch_fails_with_its_cure(tmp_path: Path) -> None:
    """A package named torch that cannot be imported stands in for a broken installation."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch.so: cannot open shared object file')\n")
    env = environment(tmp_path)
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
    done = subprocess.run(command("doctor", "--quick"), env=env, capture_output=True, check=False)
    text = done.stdout.decode()
    assert done.returncode == 3, text
    assert "fail torch" in text
    assert "pip install 'torch>=2.11'" in text
    assert "failed: torch" in text
    assert "slurm" in text  # the checks after it still ran
    assert b"Traceback" not in done.stderr


def test_slurm_is_found_by_its_commands(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sbatch", "srun", "squeue", "sacct", "scancel"):
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = penstock("doctor", "--quick", "--json", home=tmp_path, PATH=path, SLURM_JOB_ID="77")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["slurm"]["text"] == "sbatch, srun, squeue, sacct, scancel, inside job 77"


def test_the_trial_generation_with_the_demo_model(tmp_path: Path) -> None:
    done = penstock("doctor", "--json", home=tmp_path)
    report = json.loads(done.stdout)
    trial = report["checks"][-1]
    assert trial["name"] == "generation"
    assert trial["status"] == "ok", trial
    assert "16 tokens" in trial["text"]
    assert done.returncode == 0
