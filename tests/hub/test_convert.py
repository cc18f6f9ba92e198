"""`penstock convert`: tensors come over bit for bit, programs in a .bin file are never run, the jail holds."""

from __future__ import annotations

import collections
import json
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penstock.errors import ModelError, PenstockError
from penstock.hub.convert import convert
from penstock.hub.snapshot import resolve
from tests.checkpoints import save_tiny
from tests.process import check_error, penstock


def quiet(name: str, size: int) -> None:
    pass


def pickled(folder: Path, target: Path, shards: int = 1, legacy: bool = False) -> Path:
    """A copy of a model folder with its weights as torch.save writes them."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {}
    for i in range(shards):
        file = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = {name: weights[name] for name in names[i::shards]}
        torch.save(part, target / file, _use_new_zipfile_serialization=not legacy)
        files |= dict.fromkeys(part, file)
    if shards > 1:
        (target / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return target


@pytest.mark.parametrize(("shards", "legacy"), [(1, False), (1, True), (3, False)])
def test_every_tensor_is_the_same(tiny_llama: Path, tmp_path: Path, shards: int, legacy: bool) -> None:
    folder = pickled(tiny_llama, tmp_path / "model", shards, legacy)
    truth = load_file(tiny_llama / "model.safetensors")
    made = convert(folder, None, quiet)
    assert (made.folder, made.tensors) == (folder, len(truth))
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    assert resolve(str(folder)).path == folder
    assert not list(folder.glob(".converting*"))
    assert convert(folder, None, lambda name, size: pytest.fail("converted again")) == made


@pytest.mark.parametrize("legacy", [False, True])
def test_types_views_and_shared_storages(tiny_llama: Path, tmp_path: Path, legacy: bool) -> None:
    folder = pickled(tiny_llama, tmp_path / "model")
    base = torch.randn(6, 8)
    tensors: dict[str, torch.Tensor] = {
        "whole": base,
        "same": base,
        "rows": base[2:4],
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7),
        "parameter": torch.nn.Parameter(torch.randn(3)),  # type: ignore[dict-item]
        "bits": torch.tensor([True, False, True]),
        "bfloat": torch.randn(5).bfloat16(),
        "half": torch.randn(5).half(),
        "double": torch.randn(5).double(),
        **{str(t): torch.arange(5, dtype=t) for t in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)},
    }
    state = collections.OrderedDict(tensors)
    state._metadata = collections.OrderedDict(version=1)  # type: ignore[attr-defined]
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    convert(folder, tmp_path / "out", quiet)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor.detach()), name
    assert (tmp_path / "out" / "tokenizer.json").is_file()


class Program:
    """An object whose pickle is a call."""

    def __init__(self, *call: Any) -> None:
        self._call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call[0], self._call[1:]


def archive(file: Path, description: bytes) -> None:
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("archive/data.pkl", description)
        made.writestr("archive/data/0", bytes(64))


def hostile(marker: Path, port: int) -> dict[str, bytes]:
    """Pickles that would run something, in several ways of spelling it."""
    shell = f"touch {marker}"
    return {
        "os.system": pickle.dumps({"w": Program(os.system, shell)}, 2),
        "os.system by a later protocol": pickle.dumps({"w": Program(os.system, shell)}, 4),
        "a socket": pickle.dumps({"w": Program(socket.create_connection, ("127.0.0.1", port))}, 2),
        "eval": pickle.dumps({"w": Program(eval, f"open({str(marker)!r}, 'w')")}, 2),
        "open": pickle.dumps({"w": Program(open, str(marker), "w")}, 2),
        "subprocess": pickle.dumps({"w": Program(subprocess.run, ["touch", str(marker)])}, 2),
        "getattr on torch": b"\x80\x02cbuiltins\ngetattr\ncos\nsystem\n\x86R.",
        "an instance": b"\x80\x02(S'touch %s'\nios\nsystem\n." % str(marker).encode(),
        "an object": b"\x80\x02cos\nsystem\n)\x81.",
        "torch's own loader": b"\x80\x02ctorch.serialization\nload\nX\x01\x00\x00\x00a\x85R.",
        "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0f_utils.os.system\x93.",
        "attributes": b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",
    }


def test_programs_are_refused_and_not_run(tiny_llama: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.setblocking(False)
    folder = pickled(tiny_llama, tmp_path / "model")
    for name, description in hostile(marker, listener.getsockname()[1]).items():
        for wrap in (archive, Path.write_bytes):
            wrap(folder / "pytorch_model.bin", description)
            with pytest.raises(ModelError) as caught:
                convert(folder, None, quiet)
            assert "pytorch_model.bin" in caught.value.what, name
            assert not marker.exists(), name
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()
    assert not list(folder.glob("*.safetensors"))
    archive(folder / "pytorch_model.bin", hostile(marker, 1)["os.system"])
    with pytest.raises(ModelError, match="system"):
        convert(folder, None, quiet)


def lying(size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, elements: int = 16) -> bytes:
    """A description of one tensor on the 64 bytes of `archive`."""

    def push(value: Any) -> bytes:
        if isinstance(value, tuple):
            return b"(" + b"".join(map(push, value)) + b"t"
        raw = value.to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + raw

    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + push(elements)
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"tQ"
        + push(offset)
        + push(size)
        + push(stride)
        + b"\x89}tR"
    )
    return b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"s."


@pytest.mark.parametrize(
    "description",
    [
        lying((4, 5), (5, 1)),
        lying((4, 4), (4, 1), offset=1),
        lying((2**40,), (1,)),
        lying((2**40,), (0,)),
        lying((2**31, 2**31), (2**31, 1)),
        lying((-1,), (1,)),
        lying((4,), (-1,)),
        lying((4,), (2**60,)),
        lying((4,), (1,), offset=-4),
        lying((17,), (1,), elements=2**60),
        lying((4, 4), (4,)),
    ],
)
def test_tensors_outside_their_storage(tiny_llama: Path, tmp_path: Path, description: bytes) -> None:
    folder = pickled(tiny_llama, tmp_path / "model")
    archive(folder / "pytorch_model.bin", lying((4, 4), (4, 1)))
    assert convert(folder, tmp_path / "good", quiet).tensor_bytes == 64
    archive(folder / "pytorch_model.bin", description)
    with pytest.raises(ModelError, match="no list of tensors"):
        convert(folder, None, quiet)


JAILED = """
import os, socket, subprocess, sys
from penstock.hub import jail
inside = open(sys.argv[1], "rb")
import ctypes, mmap
assert jail.enter(2**31, 20) or sys.platform != "linux"
assert inside.read(3) == b"ABC"
def tries():
    yield lambda: socket.socket()
    yield lambda: open("/etc/hostname")
    yield lambda: open(sys.argv[2], "w")
    yield lambda: os.open("/", os.O_RDONLY)
    yield lambda: os.listdir("/")
    yield lambda: os.execv("/bin/true", ["true"])
    yield lambda: os.fork()
    yield lambda: subprocess.run(["/bin/true"])
    yield lambda: os.unlink(sys.argv[1])
    yield lambda: os.rename(sys.argv[1], sys.argv[2])
    yield lambda: os.kill(os.getppid(), 0)
    yield lambda: os.pipe()
    yield lambda: os.dup(0)
    yield lambda: bytearray(2**33)
held = 0
for attempt in tries():
    try:
        attempt()
    except (OSError, MemoryError):
        held += 1
print(held)
"""


def test_the_jail_holds(tmp_path: Path) -> None:
    (tmp_path / "inside").write_bytes(b"ABC")
    done = subprocess.run(
        [sys.executable, "-c", JAILED, str(tmp_path / "inside"), str(tmp_path / "new")],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "14", done.stderr
    assert (tmp_path / "inside").exists()
    assert not (tmp_path / "new").exists()


def test_damaged_files(tiny_llama: Path, tmp_path: Path) -> None:
    folder = pickled(tiny_llama, tmp_path / "model")
    raw = (folder / "pytorch_model.bin").read_bytes()
    for damage in (b"", raw[: len(raw) // 2], b"PK\3\4" + raw[50:], raw[:-200] + bytes(200), struct.pack("<Q", 99) * 9):
        (folder / "pytorch_model.bin").write_bytes(damage)
        with pytest.raises(ModelError, match=r"pytorch_model\.bin"):
            convert(folder, None, quiet)
    folder = pickled(tiny_llama, tmp_path / "sharded", shards=3)
    (folder / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(PenstockError, match=r"00002-of-00003"):
        convert(folder, None, quiet)


def test_as_its_user_would(tiny_llama: Path, tmp_path: Path) -> None:
    """A hub snapshot with .bin only: the error names the command, the command makes the model run under its name."""
    commit = "a" * 40
    repository = tmp_path / "hf" / "hub" / "models--org--old"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    pickled(save_tiny(tmp_path / "original", "llama"), repository / "snapshots" / commit, shards=2)
    (tmp_path / "prompts.txt").write_text("the quick\n")
    ask = ("generate", "org/old", "-i", tmp_path / "prompts.txt", "-o", "-", "--max-new-tokens", "4")
    offline = {"HF_HUB_OFFLINE": "1"}
    check_error(penstock(*ask, home=tmp_path, **offline), 4, "penstock convert org/old")
    done = penstock("convert", "org/old", "--json", home=tmp_path, **offline)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["folder"] == str(repository / "converted" / commit)
    done = penstock(*ask, home=tmp_path, **offline)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["generated_tokens"] == 4
