"""The whole way of a release: built, checked, installed where there is no network, moved, served from.

It takes minutes, so it runs when PENSTOCK_LONG_TESTS is set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock.cluster.release.target import this_machine
from tests.process import environment, penstock

pytestmark = [
    pytest.mark.skipif("PENSTOCK_LONG_TESTS" not in os.environ, reason="PENSTOCK_LONG_TESTS is not set"),
    pytest.mark.timeout(900),
]


def no_network(*command: str | Path) -> list[str | Path]:
    """The command in a network namespace that has its loopback and no route."""
    assert shutil.which("unshare"), "the test needs util-linux"
    return ["unshare", "-rn", "sh", "-c", 'ip link set lo up; exec "$@"', "sh", *command]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release for this machine; $PENSTOCK_RELEASE names one that is there already."""
    if os.environ.get("PENSTOCK_RELEASE"):
        return Path(os.environ["PENSTOCK_RELEASE"])
    folder = tmp_path_factory.mktemp("release")
    done = penstock("release", "build", "-o", folder, home=folder, timeout=600)
    assert done.returncode == 0, done.stderr.decode()
    return Path(done.stdout.decode().strip())


@pytest.fixture(scope="module")
def installed(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The release, installed without a network and then moved."""
    folder = tmp_path_factory.mktemp("prefix")
    env = environment(folder, PYTHON=sys.executable)
    env.pop("PYTHONPATH")
    since = time.monotonic()
    done = subprocess.run(
        no_network("sh", release / "install.sh", folder / "first"), env=env, capture_output=True, text=True
    )
    seconds = time.monotonic() - since
    assert done.returncode == 0, done.stdout + done.stderr
    print(f"installed in {seconds:.0f} s")
    assert seconds < 120
    (folder / "first").rename(folder / "moved")
    return folder / "moved"


def clean(home: Path) -> dict[str, str]:
    env = environment(home)
    env.pop("PYTHONPATH")  # or the sources would be used
    return env


def test_the_release_is_whole(release: Path, tmp_path: Path) -> None:
    assert penstock("release", "check", str(this_machine()), release, home=tmp_path, timeout=120).returncode == 0
    old = penstock("release", "check", "py3.11-glibc2.17-x86_64-cpu", release, home=tmp_path, timeout=120)
    assert old.returncode == 3
    names = (release / "licenses" / "README").read_text()
    assert "torch" in names
    assert (release / "licenses" / "torch").is_dir()


def test_it_serves_the_demo_without_a_network(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        no_network(installed / "bin" / "penstock", "chat", "demo", "How do I list my jobs on Slurm?"),
        env=clean(tmp_path), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "squeue" in done.stdout
    served = subprocess.Popen(
        no_network(installed / "bin" / "penstock", "serve", "demo", "--port", "0", "--ask", "What does sinfo do?"),
        env=clean(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert served.stdout is not None
        said = ""
        while "partitions" not in said and (line := served.stdout.readline()):
            said += line
        assert "partitions" in said, said
    finally:
        served.terminate()
        served.wait(30)


def test_nothing_in_it_names_its_place(installed: Path) -> None:
    """No script knows the prefix that it was installed to; what is compiled stays valid when files are copied."""
    first = str(installed.with_name("first")).encode()
    assert not [p for p in (installed / "bin").iterdir() if p.is_file() and first in p.read_bytes()]
    source = next(installed.rglob("penstock/errors.py"))
    (cached,) = (source.parent / "__pycache__").glob("errors.*.pyc")
    assert int.from_bytes(cached.read_bytes()[4:8], "little") == 0b01  # by hash, unchecked


def test_a_prefix_in_use_and_a_damaged_release_are_refused(release: Path, installed: Path, tmp_path: Path) -> None:
    again = subprocess.run(["sh", release / "install.sh", installed], capture_output=True, text=True)
    assert again.returncode == 2
    assert "not empty" in again.stderr
    wrong = subprocess.run(
        ["sh", release / "install.sh", tmp_path / "p"], env={**os.environ, "PYTHON": "/bin/false"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert wrong.returncode == 3
    assert "PYTHON=" in wrong.stderr
    copy = tmp_path / "release"
    copy.mkdir()
    for path in release.iterdir():
        if path.name not in ("wheels", "licenses"):
            shutil.copy(path, copy)
    damaged = subprocess.run(["sh", copy / "install.sh", tmp_path / "p"], capture_output=True, text=True)
    assert damaged.returncode == 3
    assert "damaged" in damaged.stderr
    assert not (tmp_path / "p").exists()
