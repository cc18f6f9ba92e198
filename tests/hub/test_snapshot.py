"""From what users type to a folder, and the mistakes they make on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from penstock.errors import EnvironmentFault, ModelError, PenstockError, UsageError
from penstock.hub.config import MAX_CONFIG, read_config
from penstock.hub.fingerprint import fingerprint
from penstock.hub.remote_code import own_code
from penstock.hub.snapshot import resolve

COMMIT = "ab" * 20


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def fill(cache: Path, name: str, *files: str, ref: str = "main", commit: str = COMMIT) -> Path:
    """Put a model into the cache."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    for file in files:
        (snapshot / file).write_text('{"model_type": "llama"}')
    return snapshot


def refusal(name: str, revision: str | None = None, kind: type[PenstockError] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        resolve(name, revision)
    assert len(str(caught.value).splitlines()) <= 6
    return str(caught.value)


def test_a_folder(tiny_llama: Path) -> None:
    found = resolve(str(tiny_llama))
    assert (found.path, found.revision) == (tiny_llama.resolve(), None)
    assert "is a folder" in refusal(str(tiny_llama), "main", UsageError)


def test_a_cached_model_by_each_of_its_names(cache: Path) -> None:
    snapshot = fill(cache, "org/name", "config.json", "model.safetensors")
    for typed in ("org/name", "org/name@main", f"org/name@{COMMIT}"):
        found = resolve(typed)
        assert (found.path, found.name, found.revision) == (snapshot, "org/name", COMMIT)
    assert resolve("org/name", "main").path == snapshot
    assert "holds only org/name@" + COMMIT in refusal("org/name@other", kind=EnvironmentFault)
    assert "Two revisions" in refusal("org/name@main", "v2", UsageError)


def test_a_cached_model_with_a_shard_missing_is_not_used(cache: Path) -> None:
    snapshot = fill(cache, "org/name", "config.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors is missing" in refusal("org/name", kind=EnvironmentFault)


def test_a_damaged_ref_does_not_become_a_path(cache: Path) -> None:
    snapshot = fill(cache, "org/name", "config.json", "model.safetensors")
    (snapshot.parent.parent / "refs" / "main").write_text("../../../etc")
    assert "not on this machine" in refusal("org/name", kind=EnvironmentFault)


@pytest.mark.parametrize(
    "name",
    ["", " ", "nosuch", "a/b/c", "../x", "org/..", "org/a..b", "org/a--b", "/no/such", "~/nosuch", "~nobody/x",
     "org/n\x00", "org/ü", "-org/x", "org/x.git", "x" * 5000, "org/name@", "org/name@../x", "org/name@a b"],
)  # fmt: skip
def test_names_that_are_no_names(name: str) -> None:
    text = refusal(name)
    assert "no model" in text or "not a revision" in text
    assert len(text) < 1000


def test_close_names_are_offered(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache, "meta-llama/Llama-3.2-1B", "config.json")
    (tmp_path / "mistral-7b").mkdir()
    (tmp_path / "mistral-7b" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert "Did you mean demo?" in refusal("dmo")
    assert "./mistral-7b" in refusal("mistral7b")
    assert str(tmp_path / "mistral-7b") in refusal(str(tmp_path / "mistral7b"))
    assert "meta-llama/Llama-3.2-1B" in refusal("llama-3.2-1b")
    assert "meta-llama/Llama-3.2-1B" in refusal("meta-lama/Llama-3.2-1B", kind=EnvironmentFault)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (None, "empty"),
        ("adapter_config.json", "LoRA"),
        ("model_index.json", "diffusers"),
        ("model.safetensors", "description is missing"),
        ("notes.txt", "It holds: notes.txt"),
        ("inner/config.json", "Give "),
    ],
)
def test_folders_that_are_no_models(tmp_path: Path, file: str | None, words: str) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    if file:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("{}")
    text = refusal(str(folder))
    assert "no config.json" in text
    assert words in text


def test_a_folder_of_the_cache_itself(cache: Path) -> None:
    snapshot = fill(cache, "org/name", "config.json")
    (snapshot.parent.parent / "blobs").mkdir()
    assert "org/name" in refusal(str(snapshot.parent.parent))


@pytest.mark.parametrize(
    ("name", "words"), [("m.gguf", "GGUF"), ("m.safetensors", "whole folder"), ("m.txt", "is a file")]
)
def test_files_that_are_no_models(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert words in refusal(str(tmp_path / name))


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "broken"),
        (b"{", "broken"),
        (b"\xff{}", "not UTF-8"),
        (b"[]", "not an object"),
        (b"{}", "empty object"),
        (b'{"a":' + b"[" * 100_000, "nested too deep"),
        (b'{"a": Infinity}', "Infinity"),
        (b" " * (MAX_CONFIG + 1), "not believable"),
    ],
)
def test_configurations_that_are_refused(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ModelError) as caught:
        read_config(tmp_path)
    assert words in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"auto_map": {"AutoModel": "modeling.Model"}}, "auto_map"),
        ({"text_config": {"x": [{"auto_map": {"AutoModel": "m.M"}}]}}, "text_config.x.0.auto_map"),
        ({"auto_map": {}, "a": [{}]}, None),
    ],
)
def test_code_that_a_configuration_names(config: dict[str, Any], place: str | None) -> None:
    assert own_code(config) == place


def test_what_a_user_trusts(cache: Path, tiny_llama: Path) -> None:
    """A folder, and a full commit of the hub; never a branch, and nothing unasked."""
    fill(cache, "org/name", "config.json", "model.safetensors")
    assert resolve(str(tiny_llama), code=True).trusted
    assert resolve(f"org/name@{COMMIT}", code=True).trusted
    for typed in ("org/name", "org/name@main"):
        assert not resolve(typed, code=True).trusted
    assert not resolve(str(tiny_llama)).trusted
    assert not resolve(f"org/name@{COMMIT}").trusted
    assert not resolve("demo", code=True).trusted


def test_a_configuration_linked_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    folder = tmp_path / "m"
    folder.mkdir()
    os.symlink(tmp_path / "secret", folder / "config.json")
    assert "leads out" in refusal(str(folder))


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("a")
    weights = bytearray(os.urandom(3_000_000))
    (tmp_path / "model.safetensors").write_bytes(weights)
    first = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("b")
    assert fingerprint(tmp_path) == first
    weights[:] = bytes(b ^ 1 for b in weights)  # as training would: everywhere
    (tmp_path / "model.safetensors").write_bytes(weights)
    second = fingerprint(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert len({first, second, fingerprint(tmp_path)}) == 3
