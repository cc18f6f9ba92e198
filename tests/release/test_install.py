"""The installer with a release of two wheels: without a network, into a tree that may be moved, all or nothing."""

from __future__ import annotations

import ensurepip
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from penstock.cluster.release.build import assemble, sha256
from penstock.cluster.release.target import this_machine
from penstock.cluster.release.wheels import read_wheel
from tests.process import check_error, penstock


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of a tiny package with a console script, and the pip that Python itself brings."""
    folder = tmp_path_factory.mktemp("release") / "penstock-0-test"
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    bundled = next((Path(ensurepip.__file__).parent / "_bundled").glob("pip-*.whl"), None)
    if bundled is None:
        pytest.skip("this Python brings no pip (a distribution has taken it out)")
    shutil.copy(bundled, wheels)
    files = {
        "tiny.py": "import sys\ndef main(): print('hello from', sys.prefix)\n",
        "tiny-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1\nLicense-Expression: MIT\n",
        "tiny-1.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny-1.dist-info/entry_points.txt": "[console_scripts]\ntiny = tiny:main\n",
        "tiny-1.dist-info/licenses/LICENSE": "do what you like",
    }
    record = "".join(f"{name},,\n" for name in files) + "tiny-1.dist-info/RECORD,,\n"
    with zipfile.ZipFile(wheels / "tiny-1-py3-none-any.whl", "w") as archive:
        for name, text in {**files, "tiny-1.dist-info/RECORD": record}.items():
            archive.writestr(name, text)
    assemble(folder, this_machine(), [read_wheel(path) for path in sorted(wheels.iterdir())])
    return folder


def install(release: Path, prefix: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the installer with no route to anywhere where the system lets us."""
    command = ["sh", str(release / "install.sh"), str(prefix)]
    if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0:
        command = ["unshare", "-rn", *command]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(prefix.parent), "PYTHON": sys.executable, **extra}
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_install_move_run(release: Path, tmp_path: Path) -> None:
    done = install(release, tmp_path / "first")
    assert done.returncode == 0, done.stdout + done.stderr
    moved = tmp_path / "moved here"
    (tmp_path / "first").rename(moved)
    said = subprocess.run([moved / "bin" / "tiny"], capture_output=True, text=True)
    assert said.stdout == f"hello from {moved}\n"
    assert (moved / "licenses" / "tiny" / "LICENSE").read_text() == "do what you like"
    assert "tiny 1: MIT" in (moved / "licenses" / "README").read_text()
    assert (moved / "modulefiles" / "penstock").is_dir()
    (cached,) = moved.rglob("tiny.cpython-*.pyc")
    assert int.from_bytes(cached.read_bytes()[4:8], "little") == 1  # valid by hash, unchecked: copies stay compiled
    old = str(tmp_path / "first").encode()
    assert not [p for p in (moved / "bin").iterdir() if p.is_file() and old in p.read_bytes()]


def test_the_command_installs_too(release: Path, tmp_path: Path) -> None:
    done = penstock("release", "install", release, tmp_path / "p", home=tmp_path, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "p" / "bin" / "tiny").exists()
    check_error(penstock("release", "install", tmp_path / "gone", tmp_path / "q", home=tmp_path), 2, "does not exist")


def test_a_prefix_in_use_stays_as_it_is(release: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine").write_text("mine")
    done = install(release, tmp_path / "p")
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert os.listdir(tmp_path / "p") == ["mine"]


def test_the_wrong_python(release: Path, tmp_path: Path) -> None:
    done = install(release, tmp_path / "p", PYTHON="/bin/false")
    assert done.returncode == 3
    assert "PYTHON=" in done.stderr
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("again", [False, True])
def test_damage_leaves_nothing_behind(release: Path, tmp_path: Path, again: bool) -> None:
    """A changed wheel is found by the list of hashes; with a forged list, by pip's."""
    copy = tmp_path / "copy"
    shutil.copytree(release, copy)
    wheel = copy / "wheels" / "tiny-1-py3-none-any.whl"
    before = sha256(wheel)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("evil.py", "")
    if again:
        sums = copy / "SHA256SUMS"
        sums.write_text(sums.read_text().replace(before, sha256(wheel)))
    done = install(copy, tmp_path / "p")
    assert done.returncode != 0
    assert ("Not installed" if again else "damaged") in done.stderr
    assert not (tmp_path / "p").exists()
