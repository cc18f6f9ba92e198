"""Starting a server: what it prints, what it refuses, and how soon."""

from __future__ import annotations

import json
import signal
import socket
import stat
import subprocess
import time
from pathlib import Path

import pytest

from tests.hub.fakehub import FakeHub
from tests.process import check_error, command, environment, penstock

from .conftest import StartServer
from .running import launch


def test_what_it_prints(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama, "--max-batch-size", "8")
    ready = server.ready
    assert list(ready) == ["url", "uds", "key_file", "pid", "model"]
    assert ready["pid"] == server.process.pid
    assert ready["model"] == str(tiny_llama)
    text = server.errors
    for stage in ("resolve", "model", "KV memory", "load", "warm", "ready"):
        assert any(line.startswith(stage) and " s  " in line for line in text.splitlines()), text
    for flag in ("--max-total-tokens", "--max-input-tokens", "--max-batch-prefill-tokens", "--dtype"):
        assert flag in text
    assert "(--max-batch-size)" not in text  # it was given, so it is no derived default
    for words in (
        f"Serving {tiny_llama} at {server.url}",
        f"Key file: {ready['key_file']}",
        f'-H "Authorization: Bearer $(cat {ready["key_file"]})"',
        f'OpenAI(base_url="{server.url}/v1"',
        f"ssh -N -L {server.port}:localhost:{server.port} {socket.gethostname()}",
        f"kill {server.process.pid}",
    ):
        assert words in text, words


def test_the_first_question_is_answered_before_the_block(tmp_path: Path) -> None:
    """What `make run` does: the bundled model, asked over HTTP; the answer on stdout, then what to paste."""
    server = launch(tmp_path, "demo", "--ask", "How do I list my jobs on Slurm?")
    out = server.process.stdout
    assert out is not None
    try:
        answer = out.readline().decode()
        assert "squeue" in answer
        assert json.loads(out.readline())["model"] == "demo"
        text = server.errors
        assert text.index("> How do I list my jobs") < text.index("Serving demo at")
        server.interrupt()
        assert server.wait() == 0
    finally:
        server.kill()


def test_the_curl_line_works_as_printed(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama)
    lines = server.errors.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("  curl "))
    pasted = "\n".join(lines[first : first + 3])
    done = subprocess.run(["bash", "-c", pasted], capture_output=True, check=True, timeout=30)
    assert json.loads(done.stdout)["object"] == "chat.completion"


def test_a_port_in_use_is_told_before_the_model_loads(tmp_path: Path, tiny_llama: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        began = time.monotonic()
        done = penstock("serve", tiny_llama, "--port", str(port), home=tmp_path)
    check_error(done, 3, f"127.0.0.1:{port} is in use", f"penstock serve {tiny_llama} --port 0")
    assert "load" not in done.stderr.decode()
    assert time.monotonic() - began < 3


def test_a_unix_socket(start_server: StartServer, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "run" / "penstock.sock"
    server = start_server(tiny_llama, "--uds", str(path))
    assert (server.ready["uds"], server.ready["url"]) == (str(path), "http://localhost")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert server.get("/health").status == 200
    assert server.get("/info", Authorization="").status == 401
    assert server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).status == 200
    second = penstock("serve", tiny_llama, "--uds", path, home=tmp_path)
    check_error(second, 3, "Another server listens", "--uds")
    server.process.kill()
    server.process.wait()
    assert path.exists()  # it had no time to remove it
    third = start_server(tiny_llama, "--uds", str(path))
    assert third.get("/health").status == 200
    third.interrupt()
    assert third.wait() == 0
    assert not path.exists()


def test_a_path_that_is_no_socket_is_left_alone(tmp_path: Path, tiny_llama: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("precious")
    done = penstock("serve", tiny_llama, "--uds", file, home=tmp_path)
    check_error(done, 3, "is not a socket")
    assert file.read_text() == "precious"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_starts(tmp_path: Path, tiny_llama: Path, number: int) -> None:
    server = launch(tmp_path, tiny_llama)
    try:
        while "resolve" not in server.errors:
            assert server.process.poll() is None, server.errors
            time.sleep(0.01)
        time.sleep(0.3)
        began = time.monotonic()
        server.interrupt(number)
        assert server.wait(10) == 130
        assert time.monotonic() - began < 3
        assert "Traceback" not in server.errors
        assert not list(tmp_path.rglob("*.key"))
    finally:
        server.kill()


def test_ctrl_c_while_it_downloads(tmp_path: Path) -> None:
    hub = FakeHub()
    hub.repos["org/model"] = {"config.json": b'{"model_type": "llama"}', "model.safetensors": b"x" * 1_000_000}
    hub.stall = "model.safetensors"
    with hub.running():
        server = launch(tmp_path, "org/model", HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
        try:
            assert hub.stalled.wait(30), server.errors
            time.sleep(0.2)
            began = time.monotonic()
            server.interrupt(signal.SIGINT)
            assert server.wait(10) == 130
            assert time.monotonic() - began < 3
        finally:
            server.kill()
    assert "Traceback" not in server.errors
    halves = [file for file in (tmp_path / "hf").rglob("*") if file.is_file() and 1000 < file.stat().st_size < 10**6]
    assert all(file.name.endswith((".incomplete", ".part")) for file in halves)
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors"))


def test_health_says_503_until_it_is_ready(tmp_path: Path, tiny_llama: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = launch(tmp_path, tiny_llama, "--port", str(port))
    server.ready = {"url": f"http://127.0.0.1:{port}", "key_file": None, "uds": None}
    statuses: list[int] = []
    try:
        end = time.monotonic() + 30
        while not statuses or statuses[-1] != 200:
            try:
                statuses.append(server.get("/health").status)
            except OSError:
                assert not statuses, "it was there and went away"
                assert server.process.poll() is None, server.errors
            assert time.monotonic() < end, server.errors
            time.sleep(0.01)
    finally:
        server.kill()
    assert statuses[0] == 503
    assert set(statuses) == {503, 200}


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--quantize", "nonsense"], 2, ["--quantize"]),
        (["--ngrok"], 2, ["--ngrok is not supported"]),
        (["--lora-adapters", "a"], 4, ["There is no adapter 'a'"]),
        (["--lora-adapters", "a=b@c@d"], 2, ["Invalid LoRA adapter format: a=b@c@d"]),
        (["--lora-adapters", "a=x,a=y"], 2, ["Two adapters have the name 'a'"]),
        (["--max-input-tokens", "9", "--max-input-length", "9"], 2, ["max_input_length"]),
        (["--max-input-tokens", "9", "--max-total-tokens", "9"], 2, ["must be <"]),
        (["--no-auth", "--api-key-file", "x"], 2, ["contradict"]),
        (["--hostname", "no.such.host.invalid"], 3, ["no.such.host.invalid"]),
        (["--max-total-tokens", "100000"], 2, ["--max-total-tokens"]),
    ],
)
def test_what_it_refuses(tmp_path: Path, tiny_llama: Path, flags: list[str], code: int, words: list[str]) -> None:
    done = penstock("serve", tiny_llama, "--port", "0", *flags, home=tmp_path)
    check_error(done, code, *words)
    assert not list(tmp_path.rglob("*.key"))


def test_tgis_environment_names_and_flags(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(
        tiny_llama, "--waiting-served-ratio", "1.2", "--max-best-of", "3",
        MAX_CONCURRENT_REQUESTS="7", MAX_BEST_OF="9", PENSTOCK_MAX_STOP_SEQUENCES="2", MAX_STOP_SEQUENCES="8",
        HOSTNAME="some-container-id", MAX_INPUT_LENGTH="100", SHARD_UDS_PATH="socket",
    )  # fmt: skip
    info = server.get("/info").json()
    assert info["max_concurrent_requests"] == 7  # TGI's name
    assert info["max_best_of"] == 3  # the flag beats the environment
    assert info["max_stop_sequences"] == 2  # our name beats TGI's
    assert info["max_input_tokens"] == 100
    assert server.url.startswith("http://127.0.0.1:")
    assert "note: --waiting-served-ratio has no effect" in server.errors
    assert "HOSTNAME is not an address" in server.errors


def test_options_from_a_file(start_server: StartServer, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "penstock.toml"
    file.write_text('[serve]\nmax-best-of = 5\nmax-stop-sequences = 6\nserved-model-name = "mine"\n')
    server = start_server(tiny_llama, PENSTOCK_CONFIG=str(file), MAX_STOP_SEQUENCES="3")
    info = server.get("/info").json()
    assert (info["max_best_of"], info["max_stop_sequences"], info["model_id"]) == (5, 3, "mine")


def test_a_model_by_its_tgi_name(tmp_path: Path, tiny_llama: Path) -> None:
    check_error(penstock("serve", home=tmp_path), 2, "no model")
    done = penstock("serve", "--model-id", "no/such-model", "--port", "0", "--offline", home=tmp_path)
    assert done.returncode in (3, 4)


def test_a_folder_without_a_tokenizer(tmp_path: Path, tiny_llama: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tiny_llama / name).read_bytes())
    check_error(penstock("serve", folder, "--port", "0", home=tmp_path), 4, "has no tokenizer")


def test_a_broken_chat_template_turns_only_chat_off(
    start_server: StartServer, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in tiny_llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text("{% if %}")
    server = start_server(folder)
    assert "WARNING: the model's chat template is broken" in server.errors
    answer = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]})
    assert answer.status == 422
    assert answer.json()["error"]["message"] == "Template error: template not found"
    assert server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).status == 200


def test_only_its_own_socket_listens(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama)
    inodes = set()
    for pid in (server.process.pid, server.engine_pid()):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            target = str(link.readlink())
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                listening.append(fields[1])
    assert listening == [f"0100007F:{server.port:04X}"]


def test_the_api_process_imports_nothing_heavy() -> None:
    """torch and transformers belong to the engine process."""
    code = (
        "import sys, penstock.server.launch, penstock.server.app, penstock.server.protocol\n"
        "heavy = [m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules]\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run(
        [command("x")[0], "-c", code], env=environment(Path("/nonexistent")), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
