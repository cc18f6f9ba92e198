"""What goes wrong: each in a few lines with Slurm's words and the cure, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.process import check_error, penstock

from .conftest import User


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (("--partition", "nowhere"), 2, ("Invalid partition", "main", "low", "brief", "--partition")),
        (("--gpus", "a100:1"), 2, ("configuration is not available", "gpu:toy:1")),
        (("--gpus", "9"), 2, ("configuration is not available", "gpu:toy:1")),
        (("--mem", "900G"), 2, ("Memory specification", "8000 MB")),
        (("--constraint", "nvlink"), 2, ("feature", "sinfo")),
        (("--time", "soon"), 2, ("'soon'", "3:00:00")),
        (("--renew",), 2, ("--renew needs --time",)),
        (("--name", "../up"), 2, ("'../up' cannot be",)),
        (("--sbatch", "mail"), 2, ("not a flag of sbatch",)),
        (("--api-key-file", "/nowhere/key"), 3, ("/nowhere/key",)),
        (("--no-auth", "--api-key-file", "/nowhere/key"), 2, ("contradict",)),
    ],
)
def test_refused(user: User, flags: tuple[str, ...], code: int, words: tuple[str, ...]) -> None:
    check_error(user.run("submit", "demo", *flags), code, *words)
    assert user.json("jobs") == []
    assert not list(user.jobs_directory.glob("*/*"))


def test_a_job_that_never_starts(user: User) -> None:
    """More time than the partition has: Slurm takes the job and lets it wait for ever."""
    done = user.run("submit", "demo", "--name", "long", "--partition", "brief", "--time", "2:00:00", "--wait")
    check_error(done, 2, "will never start", "--time", "penstock stop long")
    assert user.server("long")["state"] == "pending"


def test_a_model_that_cannot_be_served(user: User) -> None:
    done = user.run("submit", "org/unknown", "--name", "bad", "--wait", timeout=90)
    message = check_error(done, 3, "ended before it was ready", "the model cannot be run", "penstock logs bad")
    assert "org/unknown" in message
    assert user.server("bad")["state"] == "ended"


def test_without_slurm(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path)}
    check_error(penstock("submit", "demo", home=tmp_path, **env), 3, "no `sbatch`", "penstock serve")
    check_error(penstock("stop", "--all", home=tmp_path, **env), 3, "no `scancel`")
    assert json.loads(penstock("jobs", "--json", home=tmp_path, **env).stdout) == []
    check_error(penstock("stage", "demo", home=tmp_path, SLURM_JOB_ID="", **env), 3, "not one", "salloc")
    check_error(penstock("stage", "demo", home=tmp_path, SLURM_JOB_ID="1", **env), 3, "no `srun`")


def test_a_controller_that_is_away(user: User, tmp_path: Path) -> None:
    other = tmp_path / "slurm.conf"
    text = (user.cluster.directory / "slurm.conf").read_text()
    port = next(line for line in text.splitlines() if line.startswith("SlurmctldPort"))
    other.write_text(text.replace(port, "SlurmctldPort=9") + "MessageTimeout=2\n")
    done = user.run("submit", "demo", SLURM_CONF=str(other), timeout=120)
    check_error(done, 3, "Unable to contact slurm controller", "scontrol ping")


def test_a_full_quota(user: User, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], check=True)
    try:
        (disk / "junk").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 4096 * 2))
        done = user.run("submit", "demo", PENSTOCK_JOBS_DIR=str(disk / "jobs"))
        check_error(done, 5, "No space left", "PENSTOCK_JOBS_DIR")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_stale_files_say_is_not_believed(user: User) -> None:
    """A launch whose job Slurm has forgotten, and one that never got a job: their names are free again."""
    ready = json.loads(user.run("submit", "demo", "--name", "old", "--json", "--sbatch=--hold").stdout)
    user.cluster.run("scancel", ready["job"])
    launch = Path(ready["script"]).parent
    record = {
        "job": "999999", "restart": 0, "node": "gone", "state": "ready", "model": "demo", "since": 1.0, "host": "gone",
        "port": 1, "ready_at": 2.0,
    }  # fmt: skip
    (launch / "servers" / "999999").write_text(json.dumps(record))
    (launch / "jobs" / ready["job"]).rename(launch / "jobs" / "999999")
    (launch / "servers" / "torn").write_text('{"job": ')
    (launch / "servers" / "torn").rename(launch / "servers" / "999998")
    assert user.server("old")["state"] == "ended"
    check_error(user.run("url", "old"), 3, "does not take requests")
    again = json.loads(user.run("submit", "demo", "--name", "old", "--json", "--sbatch=--hold").stdout)
    assert Path(again["script"]).parent.name == "0002"


def test_the_script_can_be_read_first(user: User) -> None:
    """--dry-run: every option of serve arrives, nothing secret, nothing is written."""
    done = user.run(
        "submit", "demo", "--dry-run", "--partition", "main", "--time", "1:00:00", "--gpus", "toy:1", "--quantize", "int8",
        "--max-batch-size", "7", "--no-prefix-caching", "--allow-host", "a.example", "--allow-host", "b.example",
        HF_TOKEN="hf_secret", HF_HOME="/models",
    )  # fmt: skip
    script = done.stdout.decode()
    assert done.returncode == 0
    for part in (
        "#SBATCH --gres=gpu:toy:1",
        "#SBATCH --export=NONE",
        "#SBATCH --signal=B:USR1@60",
        "--quantize int8",
        "--max-batch-size 7",
        "--no-prefix-caching",
        "--allow-host a.example --allow-host b.example",
        "export HF_HOME=/models",
    ):
        assert part in script
    assert "hf_secret" not in script
    assert subprocess.run(["bash", "-n"], input=done.stdout, check=False).returncode == 0
    assert not user.jobs_directory.exists()
