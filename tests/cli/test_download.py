"""`penstock download` against a small hub on loopback: what is cut goes on, what is wrong is refused, two share."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.demo import model_path
from tests.hub.fakehub import COMMIT, FakeHub
from tests.process import check_error, command, environment, penstock

WEIGHTS = bytes(range(256)) * 4000  # 1.02 MB
GOOD = {"config.json": b'{"model_type": "llama"}', "model.safetensors": WEIGHTS, "tokenizer.json": b"{}"}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    fake = FakeHub()
    fake.repos = {"org/good": {**GOOD, "pytorch_model.bin": b"p", "run.py": b"p"}, "org/gated": GOOD}
    fake.repos["org/gguf"] = {"small.gguf": b"GGUF" * 100, "large.gguf": b"GGUF" * 1000}
    fake.repos["org/adapter"] = {"adapter_config.json": b"{}", "adapter_model.safetensors": WEIGHTS, "README.md": b"r"}
    fake.repos["org/bin-adapter"] = {"adapter_config.json": b"{}", "adapter_model.bin": b"p"}
    fake.gated, fake.token = {"org/gated"}, "hf_rightone"
    with fake.running():
        yield fake


def download(home: Path, hub: FakeHub, *args: str | Path, **extra: str) -> subprocess.CompletedProcess[bytes]:
    return penstock("download", *args, home=home, HF_ENDPOINT=hub.url, **extra)


def weights(done: subprocess.CompletedProcess[bytes]) -> bytes:
    assert done.returncode == 0, done.stderr.decode()
    return (Path(done.stdout.decode().strip()) / "model.safetensors").read_bytes()


def test_one_commit_only_what_is_needed_and_a_report(hub: FakeHub, tmp_path: Path) -> None:
    done = download(tmp_path, hub, "org/good", "--json")
    report = json.loads(done.stdout)
    assert (report["commit"], report["files"], report["verified"]) == (COMMIT, 3, True)
    assert report["bytes"] == report["fetched_bytes"] == sum(map(len, GOOD.values()))
    assert sorted(os.listdir(report["path"])) == sorted(GOOD)
    assert not [r for r in hub.requests if "pytorch_model" in r or "run.py" in r]
    again = json.loads(download(tmp_path, hub, f"org/good@{COMMIT}", "--json").stdout)
    assert again["fetched_bytes"] == 0
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


def test_code_is_fetched_of_a_pinned_commit(hub: FakeHub, tmp_path: Path) -> None:
    check_error(download(tmp_path, hub, "org/good", "--trust-remote-code"), 2, "--revision COMMIT")
    done = download(tmp_path, hub, f"org/good@{COMMIT}", "--trust-remote-code")
    assert sorted(os.listdir(done.stdout.decode().strip())) == sorted([*GOOD, "run.py"])


def test_a_killed_download_goes_on_where_it_was(hub: FakeHub, tmp_path: Path) -> None:
    """kill -9 in the middle; nothing half done is taken for a model, and the second run fetches the rest alone."""
    hub.pause = 0.05
    first = subprocess.Popen(
        command("download", "org/good"), env=environment(tmp_path, HF_ENDPOINT=hub.url), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while hub.sent.get("model.safetensors", 0) < len(WEIGHTS) / 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.wait()
    (part,) = tmp_path.rglob("*.part")
    assert 0 < part.stat().st_size < len(WEIGHTS)
    assert not list(tmp_path.rglob("snapshots"))
    hub.pause, before = 0.0, hub.sent["model.safetensors"]
    assert weights(download(tmp_path, hub, "org/good")) == WEIGHTS
    assert hub.sent["model.safetensors"] - before < len(WEIGHTS) * 0.75
    assert not list(tmp_path.rglob("*.part*"))


def test_an_interrupt_is_quick_and_leaves_a_part(hub: FakeHub, tmp_path: Path) -> None:
    hub.pause = 0.05
    first = subprocess.Popen(
        command("download", "org/good"), env=environment(tmp_path, HF_ENDPOINT=hub.url), stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 30
    while hub.sent.get("model.safetensors", 0) < 100_000 and time.monotonic() < deadline:
        time.sleep(0.02)
    since = time.monotonic()
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=20)
    assert first.returncode == 130
    assert time.monotonic() - since < 3
    assert b"Traceback" not in errors


@pytest.mark.parametrize("offset", [1, 20_000, 333_333, len(WEIGHTS) - 1])
def test_a_cut_transfer_is_resumed_within_one_run(hub: FakeHub, tmp_path: Path, offset: int) -> None:
    hub.cut = {"model.safetensors": offset}
    assert weights(download(tmp_path, hub, "org/good")) == WEIGHTS
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


def test_a_server_without_ranges(hub: FakeHub, tmp_path: Path) -> None:
    hub.ranges, hub.cut = False, {"model.safetensors": 400_000}
    assert weights(download(tmp_path, hub, "org/good")) == WEIGHTS


def test_a_spoilt_part_is_found_out(hub: FakeHub, tmp_path: Path) -> None:
    done = download(tmp_path, hub, "org/good", "--to", tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "model.safetensors.part").write_bytes(b"x" * 500_000)
    assert done.returncode == 0
    assert weights(download(tmp_path, hub, "org/good", "--to", tmp_path / "m")) == WEIGHTS


def test_wrong_content_is_fetched_again_once_then_refused(hub: FakeHub, tmp_path: Path) -> None:
    bad = WEIGHTS[:-1] + b"!"
    hub.wrong = {"model.safetensors": bad}
    assert weights(download(tmp_path, hub, "org/good")) == WEIGHTS
    entry = hub.repos["org/good"]
    hub.repos["org/liar"] = {**entry, "config.json": entry["config.json"]}

    class Always(dict[str, bytes]):
        def pop(self, key: str, *default: bytes) -> bytes:  # type: ignore[override]
            return bad if key == "model.safetensors" else default[0]

    hub.wrong = Always()
    shutil.rmtree(tmp_path / "hf")
    check_error(download(tmp_path, hub, "org/liar"), 4, "model.safetensors", "not the one the hub records")
    assert not list(tmp_path.rglob("snapshots"))


def test_a_file_that_somebody_changed_is_fetched_anew(hub: FakeHub, tmp_path: Path) -> None:
    assert weights(download(tmp_path, hub, "org/good", "--to", tmp_path / "m")) == WEIGHTS
    (tmp_path / "m" / "model.safetensors").write_bytes(b"!" + WEIGHTS[1:])
    assert weights(download(tmp_path, hub, "org/good", "--to", tmp_path / "m")) == WEIGHTS


def test_two_at_once_share_the_work(hub: FakeHub, tmp_path: Path) -> None:
    hub.pause = 0.01
    env = environment(tmp_path, HF_ENDPOINT=hub.url)
    both = [
        subprocess.Popen(command("download", "org/good"), env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    outs = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outs[0] == outs[1]
    assert hub.sent["model.safetensors"] == len(WEIGHTS)
    assert (Path(outs[0].decode().strip()) / "model.safetensors").read_bytes() == WEIGHTS


def test_gated_models_and_token_files(hub: FakeHub, tmp_path: Path) -> None:
    """The token is read from a file of ours alone; it is in no message."""
    file = tmp_path / "token"
    file.write_text("hf_rightone\n")
    file.chmod(0o644)
    check_error(download(tmp_path, hub, "org/gated", "--token-file", file), 3, "Others may read", "chmod 600")
    file.chmod(0o600)
    file.write_text("hf_wrongone\n")
    check_error(download(tmp_path, hub, "org/gated", "--token-file", file), 4, "no access yet", "--token-file")
    file.write_text("hf_rightone\n")
    done = download(tmp_path, hub, "org/gated", "--token-file", file)
    assert weights(done) == WEIGHTS
    shutil.rmtree(tmp_path / "hf")
    text = check_error(download(tmp_path, hub, "org/gated"), 4, "is gated", "no hub token", "hf auth login")
    assert "hf_rightone" not in text + done.stderr.decode()
    job = download(tmp_path, hub, "org/good", HF_TOKEN="hf_rightone", SLURM_JOB_ID="7")
    assert b"job's environment" in job.stderr
    assert b"hf_rightone" not in job.stderr


def test_rights_of_new_files(hub: FakeHub, tmp_path: Path) -> None:
    private = Path(download(tmp_path, hub, "org/good", "--to", tmp_path / "a").stdout.decode().strip())
    assert stat.S_IMODE((private / "config.json").stat().st_mode) == 0o640
    shared = tmp_path / "group"
    shared.mkdir()
    shared.chmod(0o2775)
    path = Path(download(tmp_path, hub, "org/good", "--to", shared / "m").stdout.decode().strip())
    assert path.stat().st_mode & stat.S_ISGID
    assert stat.S_IMODE((path / "config.json").stat().st_mode) == 0o664
    done = download(tmp_path, hub, "org/good", "--to", tmp_path / "b", "--umask", "077")
    assert stat.S_IMODE((Path(done.stdout.decode().strip()) / "config.json").stat().st_mode) == 0o600
    check_error(download(tmp_path, hub, "org/good", "--umask", "9"), 2, "umask")


def test_a_cache_that_strangers_may_change_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "hf" / "hub").mkdir(parents=True)
    (tmp_path / "hf" / "hub").chmod(0o777)
    check_error(download(tmp_path, hub, "org/good"), 3, "Everybody may write", "chmod o-w")


def test_one_file_of_a_gguf_repository(hub: FakeHub, tmp_path: Path) -> None:
    check_error(download(tmp_path, hub, "org/gguf"), 4, "GGUF")
    done = download(tmp_path, hub, "org/gguf", "--file", "small.gguf", "--to", tmp_path)
    assert Path(done.stdout.decode().strip()).read_bytes() == b"GGUF" * 100
    check_error(download(tmp_path, hub, "org/gguf", "--file", "tiny.gguf"), 4, "no file 'tiny.gguf'", "small.gguf")


def test_a_lora_adapter(hub: FakeHub, tmp_path: Path) -> None:
    """Its two files; afterwards it is found in the cache, without a network."""
    done = download(tmp_path, hub, "org/adapter")
    assert done.returncode == 0, done.stderr.decode()
    folder = Path(done.stdout.decode().strip())
    assert sorted(os.listdir(folder)) == ["adapter_config.json", "adapter_model.safetensors"]
    check_error(download(tmp_path, hub, "org/bin-adapter"), 4, "LoRA adapter without adapter_model.safetensors")
    find = "import sys; from penstock.hub.adapters import resolve_adapter as r; print(r(sys.argv[1]))"
    for name, endpoint in (("org/adapter", "http://127.0.0.1:9"), (f"org/adapter@{COMMIT}", hub.url)):
        env = environment(tmp_path, HF_ENDPOINT=endpoint)
        found = subprocess.run([sys.executable, "-c", find, name], env=env, capture_output=True, timeout=60, check=True)
        assert found.stdout.decode().strip() == str(folder)
    shutil.rmtree(tmp_path / "hf")  # and where it is not, it is fetched
    env = environment(tmp_path, HF_ENDPOINT=hub.url)
    subprocess.run([sys.executable, "-c", find, "org/adapter"], env=env, capture_output=True, timeout=60, check=True)
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS


def test_without_a_network_the_login_nodes_command_is_named(tmp_path: Path) -> None:
    args = ("download", "org/good", "--to", "/data/m")
    done = penstock(*args, home=tmp_path, HF_ENDPOINT="http://127.0.0.1:9", PENSTOCK_SITE="narval", SLURM_JOB_ID="1")
    check_error(done, 3, "Compute nodes of Narval", "narval.alliancecan.ca", "penstock download org/good --to /data/m")
    check_error(penstock("download", "org/good", home=tmp_path, HF_HUB_OFFLINE="1"), 3, "HF_HUB_OFFLINE", "login node")
    check_error(penstock("download", "demo", home=tmp_path), 2, "nothing to download")


def test_a_local_folder_is_served_without_any_connection(tmp_path: Path) -> None:
    """Serving a folder asks no name and opens no socket to anywhere; an audit hook in every process watches."""
    shutil.copytree(model_path(), tmp_path / "model")
    log = tmp_path / "attempts"
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(
        "import sys\n"
        "HERE = ('127.0.0.1', 'localhost', '0.0.0.0', '::1', 'None')\n"
        "def watch(event, args):\n"
        "    if (event == 'socket.getaddrinfo' and str(args[0]) not in HERE) or (\n"
        "            event == 'socket.connect' and isinstance(args[1], tuple) and str(args[1][0]) not in HERE):\n"
        f"        open({str(log)!r}, 'a').write(f'{{event}} {{args[1:]}}\\n')\n"
        "        raise OSError('blocked')\n"
        "sys.addaudithook(watch)\n"
    )
    env = environment(tmp_path)
    env["PYTHONPATH"] = f"{hook}:{env['PYTHONPATH']}"
    line = command("serve", tmp_path / "model", "--port", "0", "--ask", "How do I list my jobs on Slurm?")
    process = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert process.stdout is not None
        said = b""
        while b"squeue" not in said and (block := process.stdout.readline()):
            said += block
        assert b"squeue" in said, said.decode()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert not log.exists(), log.read_text()
    probe = subprocess.run(
        [sys.executable, "-c", "import socket; socket.create_connection(('192.0.2.1', 9), 1)"],
        env=env, capture_output=True,
    )  # fmt: skip
    assert probe.returncode != 0
    assert log.exists()  # the watch would have seen it
