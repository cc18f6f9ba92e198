"""The safetensors reader: right about good files, and every damaged one refused with its name and the reason."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from penstock.errors import ModelError
from penstock.hub.checkpoint import read_checkpoint
from tests.checkpoints import save_tiny

NAME = "model.safetensors"
TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(8, dtype=np.float16),
    "empty": np.zeros((0, 7), dtype=np.int8),
    "scalar": np.array(7, dtype=np.int64),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one good file."""
    save_file(TENSORS, tmp_path / NAME, metadata={"format": "pt"})
    return tmp_path


def refusal(folder: Path) -> str:
    """The refusal of a folder; it must name a file in it, say why, and what to do."""
    with pytest.raises(ModelError) as caught:
        read_checkpoint(folder)
    error = caught.value
    assert str(folder) in error.what
    assert error.why
    assert error.hint
    assert len(str(error).splitlines()) <= 6
    return str(error)


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(file: Path, header: dict[str, Any] | bytes, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_offsets_lead_to_the_tensors_bytes(folder: Path) -> None:
    entries = read_checkpoint(folder)
    assert entries.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        entry = entries[name]
        assert entry.shape == tensor.shape
        assert entry.file.read_bytes()[entry.start : entry.end] == tensor.tobytes()
    assert [entries[n].dtype for n in TENSORS] == ["F32", "F16", "I8", "I64"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_real_checkpoint(tiny_llama: Path, tmp_path: Path, sharded: bool) -> None:
    folder = save_tiny(tmp_path / "sharded", "llama", max_shard_size="200KB") if sharded else tiny_llama
    entries = read_checkpoint(folder)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 2) == sharded
    seen = 0
    for file in files:
        with safe_open(file, framework="np") as truth:
            for name in truth.keys():  # noqa: SIM118 (not a dict)
                seen += 1
                entry, tensor = entries[name], truth.get_tensor(name)
                assert (entry.file, entry.shape) == (file.resolve(), tensor.shape)
                assert file.read_bytes()[entry.start : entry.end] == tensor.tobytes()
    assert seen == len(entries)


def shards(folder: Path, index: bool = True) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    save_file({"a": TENSORS["a.weight"]}, folder / names[0])
    save_file({"b": TENSORS["b.weight"]}, folder / names[1])
    if index:
        weight_map = {"a": names[0], "b": names[1]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("index", [True, False])
def test_shards(tmp_path: Path, index: bool) -> None:
    shards(tmp_path, index)
    assert {n: e.file.name[6:11] for n, e in read_checkpoint(tmp_path).items()} == {"a": "00001", "b": "00002"}
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    text = refusal(tmp_path)
    assert "model-00002-of-00002.safetensors" in text
    assert "missing" in text


def test_two_files_with_the_same_tensor(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors")
    save_file(TENSORS, tmp_path / "two.safetensors")
    assert "both hold" in refusal(tmp_path)


def spoil(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["a.weight"].update(changes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (spoil(dtype="F33"), "unknown dtype"),
        (spoil(dtype=3), "unknown dtype"),
        (spoil(dtype=None), "unknown dtype"),
        (spoil(shape=[3, 5]), "takes 60 bytes"),
        (spoil(shape=[-3, -4]), "impossible shape"),
        (spoil(shape=[3.0, 4]), "impossible shape"),
        (spoil(shape=[True, 12]), "impossible shape"),
        (spoil(shape="34"), "impossible shape"),
        (spoil(shape=[1] * 40), "impossible shape"),
        (spoil(shape=[2**62, 2**62, 4]), "takes"),  # the product wraps to 0 in 64 bits
        (spoil(data_offsets=[0]), "impossible data_offsets"),
        (spoil(data_offsets=[-48, 0]), "impossible data_offsets"),
        (spoil(data_offsets=[48, 0]), "span -48"),
        (spoil(data_offsets=[0, 2**63]), "impossible data_offsets"),
        (spoil(data_offsets=[2**62, 2**62 + 48]), "gap"),
        (lambda h: h["b.weight"].update(data_offsets=h["a.weight"]["data_offsets"], shape=[24]), "overlaps"),
        (lambda h: h.pop("b.weight"), "gap"),
        (lambda h: h.update(extra={"dtype": "U8", "shape": [9], "data_offsets": [72, 81]}), "cut short"),
        (lambda h: h.update(extra=[1, 2]), "nothing usable"),
        (lambda h: h.update(__metadata__=3), "__metadata__"),
    ],
)
def test_a_header_that_lies(folder: Path, change: Callable[[dict[str, Any]], None], reason: str) -> None:
    header, data = header_of(folder / NAME)
    change(header)
    write(folder / NAME, header, data)
    text = refusal(folder)
    assert NAME in text
    assert reason in text


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "at least 8"),
        (b"\x01\x00", "at least 8"),
        (struct.pack("<Q", 2**63) + b"{}", "over the limit"),
        (struct.pack("<Q", 100_000_001) + b"{}", "over the limit"),
        (struct.pack("<Q", 3) + b"{}", "cut short"),
        (struct.pack("<Q", 2) + b"[]", "not an object"),
        (struct.pack("<Q", 2) + b"{}x", "the file has 11"),
        (struct.pack("<Q", 2) + b"{\xff", "not UTF-8"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "nested too deep"),
        (struct.pack("<Q", 9) + b'{"a":NaN}', "NaN"),
        (struct.pack("<Q", 5007) + b'{"a":' + b"1" * 5001 + b"}", "not acceptable"),
        (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "stands twice"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"GGUF" + bytes(60), "GGUF"),
    ],
)
def test_a_file_that_is_something_else(tmp_path: Path, raw: bytes, reason: str) -> None:
    (tmp_path / NAME).write_bytes(raw)
    text = refusal(tmp_path)
    assert NAME in text
    assert reason in text


def test_every_truncation_is_refused(folder: Path) -> None:
    raw = (folder / NAME).read_bytes()
    for cut in range(len(raw)):
        (folder / NAME).write_bytes(raw[:cut])
        refusal(folder)


def test_mutants_are_refused_wherever_the_reference_library_refuses(folder: Path) -> None:
    """1,000 headers with flipped bits: what we let through, the reference reader lets through with the same offsets."""
    raw = (folder / NAME).read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    rng = random.Random(7)
    passed = 0
    for _ in range(1000):
        mutant = bytearray(raw)
        for _ in range(rng.choice((1, 1, 2, 5))):
            mutant[rng.randrange(header)] ^= 1 << rng.randrange(8)
        (folder / NAME).write_bytes(mutant)
        try:
            entries = read_checkpoint(folder)
        except ModelError:
            continue
        passed += 1
        try:
            with safe_open(folder / NAME, framework="np") as truth:
                for name, entry in entries.items():
                    assert tuple(truth.get_slice(name).get_shape()) == entry.shape
        except SafetensorError as error:
            pytest.fail(f"accepted what the reference refuses: {error}: {bytes(mutant[:header])!r}")
    assert passed < 500  # most flips do harm; a reader that never refuses must not pass


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd.safetensors", "sub/x.safetensors", "..", "a\\b.safetensors", 3, ""]
)
def test_an_index_that_points_elsewhere(tmp_path: Path, name: Any) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    save_file({"a": TENSORS["a.weight"]}, tmp_path / "outside.safetensors")
    (inside / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "plain name" in refusal(inside)


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {}}, "no weight_map"),
        ({"weight_map": {"a": "model-00002-of-00002.safetensors"}}, "lacks the tensor"),
        ({"weight_map": {"a": "gone.safetensors"}}, "missing"),
    ],
)
def test_an_index_that_is_wrong(tmp_path: Path, index: dict[str, Any], reason: str) -> None:
    shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert reason in refusal(tmp_path)


def test_links_may_lead_into_the_hub_cache_only(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    save_file(TENSORS, repo / "blobs" / "hash")
    save_file(TENSORS, tmp_path / "outside")
    (snapshot / NAME).symlink_to("../../blobs/hash")
    assert read_checkpoint(snapshot).keys() == TENSORS.keys()
    (snapshot / NAME).unlink()
    (snapshot / NAME).symlink_to(tmp_path / "outside")
    assert "leads out" in refusal(snapshot)
    (snapshot / NAME).unlink()
    (snapshot / NAME).symlink_to("nowhere")
    assert "link to nothing" in refusal(snapshot)


def test_a_pipe_in_place_of_a_file_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / NAME)
    assert "not a regular file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", "pickles"),
        ("model.gguf", "GGUF"),
        ("adapter_model.safetensors", "LoRA"),
        ("config.json", "no *.safetensors"),
    ],
)
def test_folders_without_weights(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    assert reason in refusal(tmp_path)
