"""Downloading, against a small hub on loopback and with the real client library, each case in its own process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.fakehub import COMMIT, FakeHub
from tests.process import check_error, environment, penstock

RESOLVE = (
    "import sys; from penstock.hub.snapshot import resolve; from penstock.cli.main import report\n"
    "from penstock.errors import PenstockError\n"
    "try: print(resolve(*sys.argv[1:]).path)\n"
    "except PenstockError as error: sys.exit(report(error))\n"
)
GOOD = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x" * 100_000, "tokenizer.json": b"{}"}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub with one good model and some that cannot be used."""
    fake = FakeHub()
    fake.repos = {
        "org/good": {
            **GOOD,
            "pytorch_model.bin": b"pickle",
            "modeling.py": b"code",
            "consolidated.safetensors": b"z",
            "onnx/model.safetensors": b"y",
        },
        "org/gated": GOOD,
        "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"pickle"},
        "org/gguf": {"model.gguf": b"GGUF"},
        "org/adapter": {"adapter_config.json": b"{}", "adapter_model.safetensors": b"a"},
    }
    fake.gated = {"org/gated"}
    with fake.running():
        yield fake


def resolve(*args: str, home: Path, endpoint: str, **extra: str) -> subprocess.CompletedProcess[bytes]:
    env = environment(home, HF_ENDPOINT=endpoint, **extra)
    return subprocess.run([sys.executable, "-c", RESOLVE, *args], env=env, capture_output=True, timeout=60, check=False)


def test_one_snapshot_only_data_then_no_network(hub: FakeHub, tmp_path: Path) -> None:
    first = resolve("org/good", home=tmp_path, endpoint=hub.url)
    assert first.returncode == 0, first.stderr.decode()
    path = Path(first.stdout.decode().strip())
    assert path.name == COMMIT
    assert sorted(os.listdir(path)) == sorted(GOOD)
    assert (path / "model.safetensors").read_bytes() == GOOD["model.safetensors"]
    hub.requests.clear()
    assert resolve("org/good", home=tmp_path, endpoint=hub.url).stdout == first.stdout
    assert resolve(f"org/good@{COMMIT}", home=tmp_path, endpoint=hub.url).stdout == first.stdout
    assert hub.requests == []


def test_code_comes_with_a_pinned_commit_that_is_trusted(hub: FakeHub, tmp_path: Path) -> None:
    """Also where the rest is there already; a branch's code is never fetched."""
    hub.repos["org/good"]["config.json"] = b'{"auto_map": {"AutoModelForCausalLM": "modeling.M"}}'
    program = RESOLVE.replace("*sys.argv[1:]", "*sys.argv[1:], code=True")
    env = environment(tmp_path, HF_ENDPOINT=hub.url)
    for name, code in (("org/good", False), ("org/good@main", False), (f"org/good@{COMMIT}", True)):
        done = subprocess.run(
            [sys.executable, "-c", program, name], env=env, capture_output=True, timeout=60, check=True
        )
        path = Path(done.stdout.decode().strip())
        assert (path / "modeling.py").exists() == code
    assert sorted(os.listdir(path)) == sorted([*GOOD, "modeling.py"])
    hub.requests.clear()
    subprocess.run([sys.executable, "-c", program, name], env=env, capture_output=True, timeout=60, check=True)
    assert hub.requests == []


def test_an_interrupted_download_is_completed(hub: FakeHub, tmp_path: Path) -> None:
    """A snapshot that lacks a shard is not used as it is, and a broken transfer goes on where it stopped."""
    hub.cut = {"model.safetensors": 60_000}
    first = resolve("org/good", home=tmp_path, endpoint=hub.url)
    assert first.returncode == 0, first.stderr.decode()
    model = Path(first.stdout.decode().strip()) / "model.safetensors"
    assert model.read_bytes() == GOOD["model.safetensors"]
    model.unlink()
    check_error(
        resolve("org/good", home=tmp_path, endpoint=hub.url, HF_HUB_OFFLINE="1"), 3, "model.safetensors is missing"
    )
    assert resolve("org/good", home=tmp_path, endpoint=hub.url).returncode == 0
    assert model.read_bytes() == GOOD["model.safetensors"]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("org/gone", 4, ["There is no model 'org/gone'", "private", "without a token"]),
        ("org/gated", 4, ["is gated", "no hub token", "hf auth login"]),
        ("org/pickled", 4, [".bin", "pickles", "penstock convert org/pickled"]),
        ("org/gguf", 4, ["GGUF", "penstock download org/gguf --file model.gguf"]),
        ("org/adapter", 4, ["LoRA", "base model"]),
        ("org/good@v9", 4, ["no revision 'v9'"]),
    ],
)
def test_each_refusal_has_its_own_message(hub: FakeHub, tmp_path: Path, name: str, code: int, words: list[str]) -> None:
    since = time.monotonic()
    check_error(resolve(name, home=tmp_path, endpoint=hub.url), code, *words)
    assert time.monotonic() - since < 10
    assert not [r for r in hub.requests if r.endswith((".bin", ".gguf"))]


def test_gated_with_a_token_that_has_no_access(hub: FakeHub, tmp_path: Path) -> None:
    done = resolve("org/gated", home=tmp_path, endpoint=hub.url, HF_TOKEN="hf_secretsecret")
    text = check_error(done, 4, "your account has no access yet", "$HF_TOKEN")
    assert "hf_secretsecret" not in text


def test_a_close_name_in_the_cache_is_offered(hub: FakeHub, tmp_path: Path) -> None:
    resolve("org/good", home=tmp_path, endpoint=hub.url)
    check_error(resolve("org/goood", home=tmp_path, endpoint=hub.url), 4, "Did you mean org/good?")


def test_a_broken_hub(hub: FakeHub, tmp_path: Path) -> None:
    hub.status = 503
    check_error(resolve("org/good", home=tmp_path, endpoint=hub.url), 3, "503", "Try again")


def test_no_network_fails_fast_and_says_what_to_do(tmp_path: Path) -> None:
    since = time.monotonic()
    done = resolve("org/good", home=tmp_path, endpoint="http://127.0.0.1:9")
    check_error(done, 3, "org/good is not on this machine", "penstock download org/good")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts and never answers, like a swallowed packet
        done = resolve("org/good", home=tmp_path, endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
    check_error(done, 3, "org/good is not on this machine")
    assert time.monotonic() - since < 20


def test_offline_makes_no_connection_at_all(tmp_path: Path) -> None:
    """Neither the variable nor the flag nor a local folder ever touches a socket; an audit hook watches."""
    names = ("socket.connect", "socket.getaddrinfo", "socket.sendto")
    hook = f"import os, sys; sys.addaudithook(lambda e, a: e in {names} and os._exit(99))\n"
    codes = []
    for offline in ("1", "0"):
        env = environment(tmp_path, HF_HUB_OFFLINE=offline, HF_ENDPOINT="http://127.0.0.1:9")
        done = subprocess.run(
            [sys.executable, "-c", hook + RESOLVE, "org/good"], env=env, capture_output=True, timeout=60, check=False
        )
        codes.append(done.returncode)
        if offline == "1":
            check_error(done, 3, "HF_HUB_OFFLINE or --offline", "penstock download org/good")
    assert codes == [3, 99]  # the second shows that the hook sees what it should
    done = penstock("generate", "org/good", "-i", "x", "-o", "y", "--offline", home=tmp_path)
    check_error(done, 3, "--offline")
