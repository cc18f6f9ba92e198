"""Wheels against targets: by their names, by what the libraries inside them ask for, by their CUDA."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from penstock.cluster.release.build import pack, sha256
from penstock.cluster.release.check import check_release, check_wheels
from penstock.cluster.release.finish import movable_scripts
from penstock.cluster.release.target import Target, parse_target, this_machine
from penstock.errors import EnvironmentFault, UsageError
from tests.process import check_error, penstock

OLD = parse_target("py3.11-glibc2.28-x86_64-cpu")


def wheel(folder: Path, name: str, library: bytes = b"", requires: tuple[str, ...] = ()) -> Path:
    """A wheel with a METADATA and, if given, one compiled library."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    stem = "-".join(name.split("-")[:2])
    with zipfile.ZipFile(path, "w") as archive:
        lines = ["Metadata-Version: 2.4", f"Name: {name.split('-')[0]}", *(f"Requires-Dist: {r}" for r in requires)]
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{stem}.dist-info/licenses/LICENSE", "do what you like")
        if library:
            archive.writestr("pkg/_native.cpython-311-x86_64-linux-gnu.so", library)
    return path


def elf(*versions: str, machine: int = 0x3E) -> bytes:
    """The parts of a shared library that are looked at."""
    head = b"\x7fELF\x02\x01\x01" + b"\0" * 9 + b"\x03\0" + machine.to_bytes(2, "little")
    return head + b"\0" * 3_000_000 + b"".join(b"\0" + v.encode() + b"\0" for v in versions) + b"\0" * 5_000_000


@pytest.mark.parametrize(
    ("name", "target", "fault"),
    [
        ("a-1-py3-none-any.whl", "py3.11-glibc2.17-x86_64-cpu", None),
        ("a-1-py2.py3-none-any.whl", "py3.12-glibc2.17-aarch64-cpu", None),
        ("a-1-cp311-cp311-manylinux_2_28_x86_64.whl", "py3.11-glibc2.28-x86_64-cpu", None),
        ("a-1-cp39-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64.whl", "py3.12-glibc2.17-x86_64-cpu", None),
        ("a-1-cp311-cp311-manylinux_2_31_x86_64.whl", "py3.11-glibc2.28-x86_64-cpu", "glibc 2.28"),
        ("a-1-cp312-cp312-manylinux_2_17_x86_64.whl", "py3.11-glibc2.28-x86_64-cpu", "Python 3.11"),
        ("a-1-cp310-cp310-manylinux_2_17_x86_64.whl", "py3.11-glibc2.28-x86_64-cpu", "Python 3.11"),
        ("a-1-cp311-cp311-manylinux_2_28_aarch64.whl", "py3.11-glibc2.36-x86_64-cpu", "x86_64"),
        ("a-1-cp311-cp311-macosx_11_0_arm64.whl", "py3.11-glibc2.36-x86_64-cpu", "macosx"),
        ("a-1-py3-none-linux_x86_64.whl", "py3.11-glibc2.17-x86_64-cpu", None),
        ("torch-2.9.1+cu126-cp311-cp311-manylinux_2_28_x86_64.whl", "py3.11-glibc2.28-x86_64-driver550.54", None),
        ("torch-2.9.1+cu128-cp311-cp311-manylinux_2_28_x86_64.whl", "py3.11-glibc2.28-x86_64-driver470.82", "525.60"),
        ("torch-2.11.0+cu130-cp311-cp311-manylinux_2_28_x86_64.whl", "py3.11-glibc2.28-x86_64-driver550.54", "580.65"),
        ("torch-2.9.1+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", "py3.11-glibc2.28-x86_64-driver550.54", "processors"),
        ("nvidia_nccl_cu12-2.27-py3-none-manylinux2014_x86_64.whl", "py3.11-glibc2.28-x86_64-driver450.80", "CUDA 12"),
    ],
)  # fmt: skip
def test_by_name(tmp_path: Path, name: str, target: str, fault: str | None) -> None:
    found = check_wheels([wheel(tmp_path, name)], parse_target(target))
    if fault is None:
        assert found == []
    else:
        assert any(fault in finding.fault for finding in found), found


def test_a_torch_of_the_plain_index_tells_its_cuda_by_what_it_requires(tmp_path: Path) -> None:
    path = wheel(
        tmp_path,
        "torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl",
        requires=('nvidia-cublas==13.1.0.3; platform_system == "Linux"',),
    )
    (finding,) = check_wheels([path], parse_target("py3.11-glibc2.28-x86_64-driver550.54"))
    assert "CUDA 13" in finding.fault


def test_a_tag_that_promises_too_much_is_found_out(tmp_path: Path) -> None:
    """The wheel says 2.17, the library inside asks for 2.34 somewhere in its middle."""
    name = "a-1-cp311-cp311-manylinux_2_17_x86_64.whl"
    path = wheel(tmp_path, name, elf("GLIBC_2.2.5", "GLIBC_2.34", "GLIBC_2.4", "GLIBC_PRIVATE"))
    (finding,) = check_wheels([path], OLD)
    assert "needs glibc 2.34 (pkg/_native" in finding.fault
    assert check_wheels([path], parse_target("py3.11-glibc2.34-x86_64-cpu")) == []
    other = wheel(tmp_path / "b", name, elf("GLIBC_2.17", machine=0xB7))
    assert "aarch64" in check_wheels([other], OLD)[0].fault


def test_damaged_wheels(tmp_path: Path) -> None:
    (tmp_path / "a-1-py3-none-any.whl").write_bytes(b"PK no zip")
    assert "damaged" in check_wheels([tmp_path / "a-1-py3-none-any.whl"], OLD)[0].fault
    with pytest.raises(EnvironmentFault, match="not a wheel"):
        check_wheels([tmp_path / "a.tar.gz"], OLD)


def test_targets() -> None:
    text = "py3.12-glibc2.34-x86_64-driver550.54.15"
    assert str(parse_target(text)) == text
    assert parse_target(text) == Target(12, 34, "x86_64", (550, 54, 15))
    assert parse_target(text).cuda() == 12
    assert parse_target("py3.11-glibc2.28-x86_64-driver580.95").cuda() == 13
    assert OLD.cuda() is None
    assert OLD.platforms[0] == "manylinux_2_28_x86_64"
    assert "manylinux2014_x86_64" in OLD.platforms
    assert "manylinux_2_31_x86_64" not in OLD.platforms
    assert parse_target(str(this_machine())) == this_machine()
    for wrong in ("", "py2.7-glibc2.28-x86_64-cpu", "py3.11-musl1.2-x86_64-cpu", "py3.11-glibc2.28-x86_64-cuda"):
        with pytest.raises(UsageError, match="no target"):
            parse_target(wrong)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """The skeleton of a release: one wheel and the list of hashes."""
    folder = tmp_path / "penstock-0-test"
    path = wheel(folder / "wheels", "a-1-cp311-cp311-manylinux_2_28_x86_64.whl")
    (folder / "SHA256SUMS").write_text(f"{sha256(path)}  wheels/{path.name}\n")
    return folder


def test_damage_of_a_release_is_found(release: Path) -> None:
    assert check_release(release, OLD) == []
    (path,) = (release / "wheels").iterdir()
    shutil.copy(path, release / "wheels" / "b-1-py3-none-any.whl")
    assert "not listed" in check_release(release, OLD)[0].fault
    (release / "wheels" / "b-1-py3-none-any.whl").unlink()
    with path.open("ab") as stream:
        stream.write(b"\0")
    assert "damaged" in check_release(release, OLD)[0].fault
    path.unlink()
    with pytest.raises(EnvironmentFault, match="not a release"):
        check_release(release, OLD)


def test_the_command_checks_folders_and_tars(release: Path, tmp_path: Path) -> None:
    """Exit code 3 for what does not run there, with the wheel's name."""
    tar = pack(release)
    for path in (release, tar):
        assert penstock("release", "check", str(OLD), path, home=tmp_path).returncode == 0
        done = penstock("release", "check", "py3.11-glibc2.17-x86_64-cpu", path, home=tmp_path)
        check_error(done, 3, "a-1-cp311-cp311-manylinux_2_28_x86_64.whl", "glibc 2.17")
    done = penstock("release", "check", "py3.12-glibc2.28-x86_64-cpu", release, "--json", home=tmp_path)
    assert done.returncode == 3
    assert json.loads(done.stdout)["fits"] is False
    check_error(penstock("release", "check", "linux", release, home=tmp_path), 2, "no target")
    check_error(penstock("release", "check", str(OLD), tmp_path / "gone.tar", home=tmp_path), 2, "does not exist")
    (tmp_path / "no.tar").write_text("no")
    check_error(penstock("release", "check", str(OLD), tmp_path / "no.tar", home=tmp_path), 3, "not a release")
    check_error(penstock("release", "install", tmp_path, tmp_path / "p", home=tmp_path), 3, "not a release")


def test_scripts_find_the_interpreter_beside_them(tmp_path: Path) -> None:
    """Also through a link, from a path with a blank, and after a move; short and long forms of pip's first line."""
    bin_ = tmp_path / "a b" / "bin"
    bin_.mkdir(parents=True)
    (bin_ / "python").symlink_to("/usr/bin/env")
    for name, first in (
        ("short", f"#!{bin_}/python\n"),
        ("long", f"#!/bin/sh\n'''exec' \"{bin_}/python\" \"$0\" \"$@\"\n' '''\n"),
    ):
        (bin_ / name).write_text(first + "print('hello')\n")
        (bin_ / name).chmod(0o755)
    (bin_ / "other").write_text("#!/bin/sh\necho mine\n")
    (bin_ / "activate").write_text(f"VIRTUAL_ENV={bin_}\n")
    movable_scripts(bin_)
    assert (bin_ / "other").read_text() == "#!/bin/sh\necho mine\n"
    assert not (bin_ / "activate").exists()
    (bin_ / "python").unlink()
    (bin_ / "python").symlink_to(shutil.which("python3") or "/usr/bin/python3")
    moved = tmp_path / "moved here"
    (tmp_path / "a b").rename(moved)
    (tmp_path / "link").symlink_to(moved / "bin" / "short")
    for script in (moved / "bin" / "short", moved / "bin" / "long", tmp_path / "link"):
        assert str(bin_) not in (moved / "bin" / "short").read_text()
        assert subprocess.run([script], capture_output=True, text=True).stdout == "hello\n"
