"""A model on the RAM disk of every node: the same bytes, once, and gone afterwards."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.process import ROOT, command

from .conftest import User

MIB = 2**20
RAM = "/dev/shm"  # noqa: S108 (of the nodes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 MiB in two files: large enough that the ways are measured."""
    folder = tmp_path_factory.mktemp("model")
    rng = np.random.default_rng(0)
    for i in range(2):
        save_file({f"w{i}": rng.integers(0, 255, 20 * MIB, dtype=np.uint8)}, folder / f"model-{i}.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "notes.bin").write_bytes(b"not needed")
    return folder


def _in_job(user: User, nodes: int, *lines: list[str], seconds: float = 60) -> list[str]:
    """Run commands one after the other in a job on so many nodes; returns what it printed, streams together."""
    script = user.home / "job.sh"
    env = f"export HOME={user.home} PYTHONPATH={ROOT / 'src'} OMP_NUM_THREADS=1\n"
    script.write_text("#!/bin/bash\nset -e\nexec 2>&1\n" + env + "".join(" ".join(line) + "\n" for line in lines))
    out = user.home / "job.out"
    out.unlink(missing_ok=True)
    job = user.cluster.run(
        "sbatch", "--parsable", f"--nodes={nodes}", "--ntasks-per-node=1", f"--output={out}", str(script)
    )
    state = user.cluster.wait_state(job, "COMPLETED", "FAILED", seconds=seconds)
    assert state == "COMPLETED", out.read_text()
    return out.read_text().splitlines()


def _json(lines: list[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in lines if line.startswith("{")]


def _sums(folder: str) -> list[str]:
    return ["srun", "--quiet", "bash", "-c", f"'cd {folder} && cat *.safetensors *.json | sha256sum'"]


def test_staged_on_every_node_and_found_again(user: User, model: Path) -> None:
    if not user.cluster.namespaces:
        pytest.skip("the nodes share one /dev/shm here: no namespaces")
    folder = f"{RAM}/penstock-{os.getuid()}"
    lines = _in_job(
        user,
        3,
        ["srun", "--quiet", "rm", "-rf", folder],  # what other tests have staged
        command("stage", str(model), "--json"),
        _sums(f"{folder}/*[0-9a-f]/"),
        ["srun", "--quiet", "ls", f"{folder}/*[0-9a-f]/"],
        command("stage", str(model), "--json"),
        command("stage", str(model), "--clean"),
        ["srun", "--quiet", "bash", "-c", f"'test ! -e {folder} && echo clean'"],
    )
    first, second = _json(lines)
    assert first["nodes"] == user.cluster.nodes
    assert str(first["path"]).startswith(folder)
    assert not first["reused"]
    assert second["reused"]
    sums = [line for line in lines if line.endswith("  -")]
    assert len(sums) == 3
    assert len(set(sums)) == 1
    assert not any("notes.bin" in line for line in lines)
    assert any("predicted for all of it" in line for line in lines)
    assert lines.count("clean") == 3


def test_every_strategy_brings_the_same_bytes(user: User, model: Path) -> None:
    """The table times each way for 1, 2 and 3 nodes; each copy is checked against the source."""
    lines = _in_job(user, 3, command("stage", str(model), "--measure", "--json"), seconds=90)
    rows = json.loads(next(line for line in lines if line.startswith("[")))
    assert [row["nodes"] for row in rows if row["strategy"] == "direct"] == [1, 2, 3]
    assert {row["strategy"] for row in rows if row["nodes"] == 3} == {"direct", "chain", "broadcast", "sbcast"}
    assert not [row for row in rows if row["problem"]]
    assert all(row["seconds"] > 0 for row in rows)


def test_with_a_command_the_copy_goes_with_it(user: User, model: Path) -> None:
    lines = _in_job(
        user,
        1,
        ["srun", "--quiet", "rm", "-rf", f"{RAM}/penstock-{os.getuid()}"],  # what other tests have staged
        command("stage", str(model), "--", "ls", "{}"),
        ["srun", "--quiet", "bash", "-c", f"'test ! -e {RAM}/penstock-{os.getuid()} && echo clean'"],
    )
    assert "model-0.safetensors" in lines
    assert "clean" in lines


def test_what_does_not_fit_goes_to_the_local_disk_or_is_refused(user: User, tmp_path: Path) -> None:
    if not user.cluster.namespaces:
        pytest.skip("the nodes share one /dev/shm here: no namespaces")
    large = tmp_path / "large"
    large.mkdir()
    save_file({"w": np.zeros(110 * MIB, dtype=np.uint8)}, large / "model.safetensors")  # /dev/shm has 96 MiB
    (large / "config.json").write_text('{"model_type": "llama"}')
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    lines = _in_job(
        user,
        1,
        [f"export TMPDIR={scratch};", "!", *command("stage", str(large), "--to", "ram")],
        [f"TMPDIR={scratch}", *command("stage", str(large), "--", "echo", "at", "{}")],
    )
    text = "\n".join(lines)
    assert "fits nowhere" in text
    assert "96 MiB free" in text or "95" in text
    assert f"at {scratch}/penstock-" in text
    assert not list(scratch.iterdir())


def test_a_server_from_the_ram_disk(user: User) -> None:
    """`submit --stage`: it serves the copy, and the copy goes when it ends."""
    user.submit("demo", "--name", "staged", "--stage")
    log = user.run("logs", "staged").stdout.decode()
    assert f"{RAM}/penstock-{os.getuid()}/" in log
    done = user.run("chat", "--job", "staged", "--temperature", "0", "What does sinfo do?")
    assert b"partitions" in done.stdout
    assert user.run("url", "staged", "--json").returncode == 0
    node = user.server("staged")["node"]
    user.run("stop", "staged")
    left = user.cluster.run("srun", "--quiet", f"--nodelist={node}", "ls", RAM)
    assert left == ""
