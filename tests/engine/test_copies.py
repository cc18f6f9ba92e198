"""Packed copies: the same weights come back out of them, and nothing that is not one is taken for one."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from penstock.engine import copies
from penstock.engine.copies import PackedCopy
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest
from penstock.models import packed_copy
from tests.checkpoints import save_model, save_tiny
from tests.encoder_decoders import SHAPES as PAIRS
from tests.encoder_decoders import save_encoder_decoder
from tests.engine.driver import Generated, generate, started
from tests.engine.test_quantize import save_with_outliers
from tests.families import SHAPES

FORMS = ("none", "int8", "int4", "bf16")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def written() -> None:
    """Wait for the thread that writes a copy."""
    for thread in threading.enumerate():
        if thread.name == "packed-copy":
            thread.join()


def answers(engine: EngineLoop) -> dict[int, Generated]:
    prompts = ([5, 6, 7], list(range(10, 50)), [9])
    return generate(
        engine,
        [
            EngineRequest(id=i, prompt_ids=ids, max_new_tokens=12, ignore_eos=True, logprobs=True)
            for i, ids in enumerate(prompts)
        ],
    )


def start(folder: Path, kept: Path, **options: object) -> tuple[dict[int, Generated], str]:
    """What a model answers that may use copies in `kept`, and what it said when it had loaded."""
    engine, stages = started(folder, packed_copy=str(kept), max_batch_total_tokens=1024, **options)
    written()
    return answers(engine), stages["load"]


@pytest.mark.parametrize(("number", "name"), list(enumerate(SHAPES)))
def test_a_model_out_of_its_copy_is_the_same_model(number: int, name: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", SHAPES[name])
    form = FORMS[number % len(FORMS)]
    options = {"quantize": form, "dtype": "float32" if form == "none" else "bfloat16"}
    first, said = start(folder, tmp_path / "kept", **options)
    assert "is written" in said
    again, said = start(folder, tmp_path / "kept", **options)
    assert "mapped" in said
    assert again == first
    assert len(list((tmp_path / "kept").glob("*.packed"))) == 1


@pytest.mark.parametrize("name", PAIRS)
def test_an_encoder_decoder_too(name: str, tmp_path: Path) -> None:
    folder = save_encoder_decoder(tmp_path / "model", PAIRS[name])
    first, _ = start(folder, tmp_path / "kept")
    again, said = start(folder, tmp_path / "kept")
    assert "mapped" in said
    assert again == first


def test_outlier_channels_are_found_once(tmp_path: Path) -> None:
    """What the search for them found is in the copy, and said again."""
    folder = tmp_path / "model"
    save_with_outliers(folder)
    first, said = start(folder, tmp_path / "kept", dtype="bfloat16", quantize="int8")
    assert "outlier channels" in said
    again, said = start(folder, tmp_path / "kept", dtype="bfloat16", quantize="int8")
    assert "outlier channels" in said
    assert "mapped" in said
    assert again == first


def test_what_decides_the_content_decides_the_copy(tiny_llama: Path, tmp_path: Path) -> None:
    folder, kept = tmp_path / "model", tmp_path / "kept"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())

    def mapped(**options: object) -> bool:
        return "mapped" in start(folder, kept, **options)[1]

    assert not mapped()
    assert mapped()
    assert not mapped(dtype="bfloat16")
    assert not mapped(quantize="int8", dtype="bfloat16")
    assert mapped()
    assert mapped(max_total_tokens=64)  # no table of this model ends there
    assert not mapped(rope_scaling="linear", rope_factor=2.0)
    weights = next(folder.glob("*.safetensors"))
    os.utime(weights, (1, 1))  # edited, for all that can be told in a moment
    assert not mapped()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.01}))
    assert not mapped()


def test_whatever_is_wrong_with_a_copy_the_checkpoint_is_read(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A link to nowhere that no loader would open; a cache below a file; a page that cannot be read."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "consolidated.safetensors").symlink_to("nowhere")
    expected, said = start(folder, tmp_path / "kept")
    assert "packed copy" not in said
    assert "no packed copy" in caplog.text
    (folder / "consolidated.safetensors").unlink()
    assert start(folder, folder / "config.json" / "kept")[0] == expected
    assert "is written" in start(folder, tmp_path / "kept")[1]

    class BadSector(mmap.mmap):
        def madvise(self, *_arguments: int) -> None:
            raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(packed_copy.mmap, "mmap", BadSector)
    got, said = start(folder, tmp_path / "kept")
    assert "mapped" not in said
    assert got == expected


def test_small_models_and_other_disks_have_none(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE", "/dev/shm/penstock-no-such")  # noqa: S108 - a memory disk, where none may be
    for least in (copies.LEAST_BYTES, 0):
        monkeypatch.setattr(copies, "LEAST_BYTES", least)
        _, stages = started(tiny_llama)
        assert "packed copy" not in stages["load"]
    assert not Path("/dev/shm/penstock-no-such").exists()  # noqa: S108


def test_a_local_disk_is_told_from_another(tmp_path: Path) -> None:
    assert not copies._is_local(Path("/dev/shm/x/y"))  # noqa: S108
    assert not copies._is_local(Path("/proc/1"))
    assert copies._is_local(tmp_path / "not" / "yet") == copies._is_local(tmp_path)


LENGTH = len(packed_copy.MAGIC)
HEAD = LENGTH + 40


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def cut_in_head(data: bytes) -> bytes:
    return data[: HEAD + 10]


def empty(_data: bytes) -> bytes:
    return b""


def other_magic(data: bytes) -> bytes:
    return b"x" + data[1:]


def long_head(data: bytes) -> bytes:
    return data[:LENGTH] + struct.pack("<Q", 2**63) + data[LENGTH + 8 :]


def one_digit(data: bytes) -> bytes:
    return data.replace(b'"n": 64', b'"n": 65', 1)


def retold(old: str, new: str) -> Callable[[bytes], bytes]:
    """Another word of the same length in the description, by somebody who knows how such a file is made."""

    def change(data: bytes) -> bytes:
        assert old.encode() in data
        data = data.replace(old.encode(), new.encode().ljust(len(old)), 1)
        (length,) = struct.unpack_from("<Q", data, LENGTH)
        digest = hashlib.sha256(data[HEAD : HEAD + length]).digest()
        return data[: LENGTH + 8] + digest + data[HEAD:]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        cut_in_head,
        empty,
        other_magic,
        long_head,
        one_digit,
        retold("penstock.models.norms:RmsNorm", "penstock.models.norms:rms_norm"),
        retold("penstock.models.norms:RmsNorm", "penstock.kernels.native:os"),
        retold("penstock.models.norms:RmsNorm", "os:system"),
        retold('"eps":', '"epz":'),
        retold('"float32"', '"object"'),
        retold('"tensors": [[', '"tensors": {}'),
        retold('"tensor": 1', '"tensor": 9e9'),
    ],
)
def test_a_damaged_copy_is_deleted_and_made_anew(
    damage: Callable[[bytes], bytes], tiny_llama: Path, tmp_path: Path
) -> None:
    expected, _ = start(tiny_llama, tmp_path)
    (file,) = tmp_path.glob("*.packed")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    got, said = start(tiny_llama, tmp_path)
    assert "is written" in said
    assert got == expected
    assert file.read_bytes() == whole
    assert "mapped" in start(tiny_llama, tmp_path)[1]


def test_tensors_lie_inside_the_file() -> None:
    """A description may name no place outside: every offset and shape of 2,000 made-up ones is checked."""
    memory = torch.zeros(1024, dtype=torch.uint8)
    made = 0
    random = torch.Generator().manual_seed(0)
    for _ in range(2000):
        rows, columns, offset = torch.randint(-20, 40, (3,), generator=random).tolist()
        try:
            tensor = packed_copy._tensor(memory, "float32", [rows, columns], offset * 64)
        except packed_copy.Unreadable:
            continue
        made += 1
        begin = tensor.data_ptr() - memory.data_ptr()
        assert tensor.nbytes == 0 or 0 <= begin < begin + tensor.nbytes <= 1024
    assert 0 < made < 2000


def test_a_copy_that_others_may_write_is_not_used(tiny_llama: Path, tmp_path: Path) -> None:
    start(tiny_llama, tmp_path)
    (file,) = tmp_path.glob("*.packed")
    file.chmod(0o660)
    assert "mapped" not in start(tiny_llama, tmp_path)[1]
    file.chmod(0o600)
    assert "mapped" in start(tiny_llama, tmp_path)[1]
    file.rename(tmp_path / "elsewhere")
    file.symlink_to("elsewhere")
    assert "mapped" not in start(tiny_llama, tmp_path)[1]
    tmp_path.chmod(0o770)
    assert "packed copy" not in start(tiny_llama, tmp_path)[1]
    tmp_path.chmod(0o700)


def test_the_copy_used_longest_ago_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> set[str]:
        return {file.stem for file in tmp_path.glob("*.packed")}

    for age, name in enumerate(("new", "middle", "old")):
        file = tmp_path / f"{name}.packed"
        file.write_bytes(bytes(1000))
        os.utime(file, (10**9 - age, 10**9 - age))
    monkeypatch.setattr(
        copies.shutil, "disk_usage", lambda _: SimpleNamespace(free=5000)
    )  # copies may take 4,000 bytes
    assert copies._make_room(tmp_path, 1000)
    assert kept() == {"new", "middle", "old"}
    assert copies._make_room(tmp_path, 2000)
    assert kept() == {"new", "middle"}
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert not copies._make_room(tmp_path, 2000)  # does not fit even alone: nothing is deleted for it
    assert kept() == {"new", "middle"}


@dataclass(frozen=True)
class Weights:
    """Some, in a module that counts as ours."""

    big: torch.Tensor


def test_one_writes_at_a_time(tmp_path: Path) -> None:
    place = PackedCopy(tmp_path / "a.packed")
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = place.write_beside([torch.ones(4)], "")
        assert thread is not None
        thread.join()
        assert not place.path.exists()
    thread = place.write_beside([torch.ones(4)], "")
    assert thread is not None
    thread.join()
    assert place.read() is not None


@pytest.mark.parametrize("what", [object(), {"a": 1}, Weights(torch.ones(1)), torch.ones(1).to_sparse()])
def test_what_a_file_cannot_say_is_not_kept(what: object, tmp_path: Path) -> None:
    assert PackedCopy(tmp_path / "a.packed").write_beside([what], "") is None


WRITER = """
import sys, time, torch
from pathlib import Path
from penstock.engine.copies import PackedCopy
PackedCopy(Path(sys.argv[1])).write_beside([torch.ones(2**26) for _ in range(2)], "")
print("begun", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize(("seconds", "signalled"), [(0.0, False), (0.3, False), (60.0, True)])
def test_a_process_that_ends_meanwhile_ends_well_and_leaves_nothing(
    seconds: float, signalled: bool, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path / "a.packed"), str(seconds)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    if signalled:
        time.sleep(0.3)
        child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=30) == (-signal.SIGKILL if signalled else 0)
    child.stdout.close()
    assert {file.name for file in tmp_path.iterdir()} <= {".lock"}


def test_a_full_disk_costs_the_copy_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        thread = PackedCopy(tmp_path / "a.packed").write_beside([torch.ones(2**20)], "")
        assert thread is not None
        thread.join()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "no packed copy" in caplog.text
    assert {file.name for file in tmp_path.iterdir()} == {".lock"}


def test_both_of_two_names_for_one_tensor_are_one(tmp_path: Path) -> None:
    shared = torch.randn(64, 64)
    place = PackedCopy(tmp_path / "a.packed")
    thread = place.write_beside([shared, (shared, shared[:2]), None, 1.5, float("inf"), "text", True], "remark")
    assert thread is not None
    thread.join()
    found = place.read()
    assert found is not None
    (first, (second, part), *rest), remark = found
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(first, shared)
    assert torch.equal(part, shared[:2])
    assert (rest, remark) == ([None, 1.5, float("inf"), "text", True], "remark")


def test_dummy_weights_and_off_have_none(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    for options in ({"packed_copy": "off"}, {"packed_copy": str(tmp_path / "kept"), "dummy_weights": True}):
        _, stages = started(folder, **options)
        assert "packed copy" not in stages["load"]
    assert not (tmp_path / "kept").exists()
