"""`penstock embed` from the command line: numbers are transformers', files are what others read, kills lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from penstock.text.tokenizer import load_tokenizer
from tests.checkpoints import save_tiny
from tests.process import check_error, command, environment, penstock

TEXTS = ["the quick brown fox", "jumps", "over a lazy dog while seven wizards make toxic brew " * 4, "an evil queen 42"]


@pytest.fixture(scope="module")
def truth(tiny_llama: Path) -> list[np.ndarray]:
    """For every text transformers' hidden states, [layers + 1, tokens, hidden]."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(tiny_llama)
    assert tokenizer is not None
    with torch.inference_mode():
        return [
            torch.stack(model(torch.tensor([tokenizer.encode(t)]), output_hidden_states=True).hidden_states)[
                :, 0
            ].numpy()
            for t in TEXTS
        ]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": f"r{i}", "prompt": t}) + "\n" for i, t in enumerate(TEXTS)))
    return file


def read(file: Path) -> dict[str, Any]:
    """The arrays of an output, its ids and what it says of itself."""
    if file.suffix == ".npz":
        with np.load(file) as archive:
            found = dict(archive)
        return {**found, "ids": found["ids"].tolist(), "about": json.loads(str(found["about"]))}
    with safe_open(file, "np") as archive:
        found = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
        about = archive.metadata()
    return {**found, "ids": json.loads(about["ids"]), "about": about}


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=0)


@pytest.mark.parametrize(("pool", "suffix"), [("mean", ".safetensors"), ("last", ".npz"), ("cls", ".npz")])
def test_pooled(tiny_llama: Path, rows: Path, tmp_path: Path, truth: list[np.ndarray], pool: str, suffix: str) -> None:
    expected = {"mean": lambda s: s.mean(axis=0), "last": lambda s: s[-1], "cls": lambda s: s[0]}[pool]
    out = tmp_path / f"out{suffix}"
    done = penstock(
        "embed", tiny_llama, "-i", rows, "-o", out, "--layers", "-1,0,-2", "--pool", pool, "--json",
        "--dtype", "float32", home=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["done"] == 4
    found = read(out)
    assert found["ids"] == ["r0", "r1", "r2", "r3"]
    for layer in (0, 2, 3):
        close(found[f"layer_{layer}"], np.stack([expected(states[layer]) for states in truth]))
    assert not list(tmp_path.glob("*.part*"))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_every_token_of_every_layer(
    tiny_llama: Path, rows: Path, tmp_path: Path, truth: list[np.ndarray], suffix: str
) -> None:
    out = tmp_path / f"all{suffix}"
    done = penstock(
        "embed", tiny_llama, "-i", rows, "-o", out, "--layers", "all", "--pool", "none", "--dtype", "float32",
        "--max-batch-prefill-tokens", "16", home=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    found = read(out)
    tokenizer = load_tokenizer(tiny_llama)
    assert tokenizer is not None
    for r, states in enumerate(truth):
        start, stop = found["offsets"][r : r + 2]
        assert found["token_ids"][start:stop].tolist() == tokenizer.encode(TEXTS[r])
        for layer in range(4):
            close(found[f"layer_{layer}"][start:stop], states[layer])


def test_parquet(tiny_llama: Path, rows: Path, tmp_path: Path, truth: list[np.ndarray]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    base = ("embed", tiny_llama, "-i", rows, "--dtype", "float32")
    for pool in ("mean", "none"):
        done = penstock(*base, "-o", tmp_path / f"{pool}.parquet", "--pool", pool, home=tmp_path)
        assert done.returncode == 0, done.stderr.decode()
    pooled = parquet.read_table(tmp_path / "mean.parquet").to_pydict()
    assert pooled["id"] == ["r0", "r1", "r2", "r3"]
    close(np.array(pooled["layer_3"], np.float32), np.stack([states[3].mean(axis=0) for states in truth]))
    whole = parquet.read_table(tmp_path / "none.parquet").to_pydict()
    for ours, states in zip(whole["layer_3"], truth, strict=True):
        close(np.array(ours, np.float32), states[3])


def test_layers_of_a_model_within_a_model(rows: Path, tmp_path: Path) -> None:
    """Its config.json says how many in the part about the decoder."""
    folder, out = save_tiny(tmp_path / "model", "gemma-3-4b"), tmp_path / "out.npz"
    done = penstock("embed", folder, "-i", rows, "-o", out, "--layers", "0,-1", home=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert {"layer_0", "layer_3"} <= read(out).keys()


def test_rows_with_errors_keep_their_place(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    prompts: list[list[int]] = [[5, 6], [7] * 5000, [8]]
    file.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in prompts))
    out = tmp_path / "out.npz"
    done = penstock("embed", tiny_llama, "-i", file, "-o", out, home=tmp_path)
    check_error(done, 6, "1 of 3 rows")
    found = read(out)
    assert found["ids"] == [1, 2, 3]
    assert np.isnan(found["layer_3"]).all(axis=1).tolist() == [False, True, False]
    assert "must be <= 512" in found["about"]["errors"]["2"]
    done = penstock("embed", tiny_llama, "-i", file, "-o", tmp_path / "t.npz", "--pool", "none", home=tmp_path)
    assert read(tmp_path / "t.npz")["offsets"].tolist() == [0, 2, 2, 3]


def test_killed_and_run_again(tiny_llama: Path, tmp_path: Path) -> None:
    """kill -9 in the middle, twice, and a torn end: the file is that of a run without kills."""
    file = tmp_path / "rows.jsonl"
    rng = np.random.default_rng(2)
    ids = [rng.integers(5, 512, rng.integers(1, 400)).tolist() for _ in range(600)]
    file.write_text("".join(json.dumps({"prompt_token_ids": row}) + "\n" for row in ids))
    out = tmp_path / "out.safetensors"
    base = ("embed", tiny_llama, "-i", file, "--layers", "all", "--dtype", "float32", "--pool", "none")
    lines = tmp_path / "out.safetensors.part.jsonl"
    for kill in range(2):
        before = lines.read_bytes().count(b"\n") if lines.exists() else 0
        process = subprocess.Popen(command(*base, "-o", out), env=environment(tmp_path), stderr=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if lines.exists() and lines.read_bytes().count(b"\n") > before + 60:
                break
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert 60 < lines.read_bytes().count(b"\n") < 600
        if kill == 0:
            with lines.open("ab") as torn:
                torn.write(b'{"number":599,"id":600,"wid')
            with (tmp_path / "out.safetensors.part").open("r+b") as damaged:
                damaged.write(b"\xff" * 8)  # the first row's first numbers
    done = penstock(*base, "-o", out, "--json", home=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["done_before"] > 100
    assert penstock(*base, "-o", tmp_path / "calm.safetensors", home=tmp_path).returncode == 0
    ours, calm = read(out), read(tmp_path / "calm.safetensors")
    assert ours.keys() == calm.keys()
    for name in ("offsets", "token_ids"):
        assert np.array_equal(ours[name], calm[name])
    for layer in range(4):
        close(ours[f"layer_{layer}"], calm[f"layer_{layer}"])
    done = penstock(*base, "-o", out, "--json", home=tmp_path)
    assert (done.returncode, json.loads(done.stdout)["done_before"]) == (0, 600)
    check_error(penstock(*base[:-1], "mean", "-o", out, home=tmp_path), 2, "belongs to another run", "pool")


def test_what_cannot_be(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    base = ("embed", tiny_llama, "-i", rows)
    check_error(penstock(*base, "-o", tmp_path / "out.txt", home=tmp_path), 2, ".safetensors, .npz, .parquet")
    check_error(penstock(*base, "-o", "-", home=tmp_path), 2, "must be a file")
    for layers, reason in (("4", "0 to 3"), ("-5", "0 to 3"), ("1,1", "once"), ("x", "not a list")):
        check_error(penstock(*base, "-o", tmp_path / "o.npz", "--layers", layers, home=tmp_path), 2, reason)
    (tmp_path / "mine.npz").write_bytes(b"precious")
    check_error(penstock(*base, "-o", tmp_path / "mine.npz", home=tmp_path), 2, "not from `penstock embed`")
    assert (tmp_path / "mine.npz").read_bytes() == b"precious"
