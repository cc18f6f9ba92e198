"""`penstock chat`: one question, a pipe, a conversation on a terminal, in process and against a server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from penstock.cli.chat import terminal_safe
from penstock.cli.conversation import Message, drop_oldest
from tests.cli.terminal import Terminal
from tests.process import check_error, command, environment, penstock

SHORT = ("--max-new-tokens", "12")
QUESTION = "the quick brown fox"


def answer(*args: str | Path, home: Path, stdin: bytes = b"") -> dict[str, Any]:
    done = penstock("chat", *args, "--json", home=home, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    value: dict[str, Any] = json.loads(done.stdout)
    return value


@pytest.fixture(scope="module")
def greedy(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The greedy answer to QUESTION."""
    return answer(tiny_llama, QUESTION, *SHORT, home=tmp_path_factory.mktemp("greedy"))


class Serving:
    """A running `penstock serve`."""

    def __init__(self, home: Path, *args: str | Path) -> None:
        self.home = home
        self.process = subprocess.Popen(
            command("serve", *args, "--json"), env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.process.stdout is not None
        self.ready: dict[str, Any] = json.loads(self.process.stdout.readline() or b"{}")
        assert self.process.stderr is not None
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        assert self.ready

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server on a free port, its key where servers keep keys."""
    serving = Serving(tmp_path_factory.mktemp("serve"), tiny_llama, "--port", "0", "--served-model-name", "tiny")
    yield serving
    serving.stop()


@pytest.fixture(scope="module")
def socket_server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server at a unix socket."""
    home = tmp_path_factory.mktemp("uds")
    serving = Serving(home, tiny_llama, "--uds", home / "s.sock", "--served-model-name", "tiny")
    yield serving
    serving.stop()


def test_one_question_and_a_pipe(tiny_llama: Path, tmp_path: Path, greedy: dict[str, Any]) -> None:
    assert (greedy["finish_reason"], greedy["generated_tokens"]) == ("length", 12)
    plain = penstock("chat", tiny_llama, QUESTION, *SHORT, home=tmp_path)
    assert plain.stdout.decode() == greedy["text"] + "\n"
    assert answer(tiny_llama, *SHORT, home=tmp_path, stdin=QUESTION.encode() + b"\n") == greedy
    system = answer(tiny_llama, QUESTION, *SHORT, "--system", "Be brief.", home=tmp_path)
    assert system["prompt_tokens"] > greedy["prompt_tokens"]


def test_bad_questions(tiny_llama: Path, tmp_path: Path) -> None:
    check_error(penstock("chat", tiny_llama, home=tmp_path, stdin=b"  \n"), 2, "question is empty")
    check_error(penstock("chat", tiny_llama, home=tmp_path, stdin=b"caf\xe9"), 2, "not UTF-8 (byte 4)")
    done = subprocess.run(
        [*command("chat", tiny_llama), b"caf\xe9"], env=environment(tmp_path), capture_output=True, check=False
    )
    check_error(done, 2, "not UTF-8")
    check_error(penstock("chat", tiny_llama, "fox " * 3000, home=tmp_path), 2, "fit into the model's context")
    check_error(penstock("chat", "nosuch", "hello", home=tmp_path), 4, "no model 'nosuch'")


def copy_without(source: Path, folder: Path, **settings: Any) -> Path:
    """The model with other tokenizer settings, or without a tokenizer."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(source / name, folder / name)
    if settings:
        (folder / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
        config = json.loads((source / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
    return folder


def test_models_without_template_or_tokenizer(tiny_llama: Path, tmp_path: Path) -> None:
    plain = copy_without(tiny_llama, tmp_path / "plain", chat_template=None)
    done = penstock("chat", plain, QUESTION, *SHORT, home=tmp_path)
    assert done.returncode == 0
    assert done.stderr.count(b"has no chat template") == 1
    rows = penstock("generate", plain, "-i", "-", "-o", "-", *SHORT, home=tmp_path, stdin=QUESTION.encode())
    assert done.stdout.decode() == json.loads(rows.stdout)["text"] + "\n"
    bare = copy_without(tiny_llama, tmp_path / "bare")
    check_error(penstock("chat", bare, QUESTION, home=tmp_path), 4, "no tokenizer")
    broken = copy_without(tiny_llama, tmp_path / "broken", chat_template="{% if %}")
    check_error(penstock("chat", broken, QUESTION, home=tmp_path), 4, "chat template", "broken")


def test_a_conversation_on_a_terminal(tiny_llama: Path, tmp_path: Path, greedy: dict[str, Any]) -> None:
    terminal = Terminal("chat", tiny_llama, *SHORT, home=tmp_path)
    terminal.wait_for("> ")
    terminal.type(QUESTION + "\n")
    first = terminal.wait_for("> ")
    shown = terminal_safe(greedy["text"]).replace("\n", "\r\n")
    assert shown in first
    terminal.type(QUESTION + "\n")
    assert shown not in terminal.wait_for("> ")  # the second turn has a history
    terminal.type("/clear\n")
    terminal.wait_for("> ")
    terminal.type(QUESTION + "\n")
    assert shown in terminal.wait_for("> ")
    terminal.type("/system Speak like a wizard.\n")
    terminal.wait_for("> ")
    terminal.type("/clear\n")
    terminal.wait_for("> ")
    terminal.type(QUESTION + "\n")
    assert shown not in terminal.wait_for("> ")
    terminal.type("/what\n")
    assert "/exit" in terminal.wait_for("> ")
    for _ in range(12):  # far more than the context holds: the oldest turns go
        terminal.type("seven wizards make toxic brew for an evil queen " * 3 + "\n")
        assert "Error" not in terminal.wait_for("> ")
    terminal.type("fox " * 800 + "\n")
    assert "fit into the model's context" in terminal.wait_for("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.seen


def test_ctrl_c_ends_the_answer_and_ctrl_d_the_chat(tiny_llama: Path, tmp_path: Path) -> None:
    """The answers would have 15,000 tokens, which take many seconds; each is stopped after its first words."""
    patient = copy_without(tiny_llama, tmp_path / "patient", model_max_length=20_000)
    config = json.loads((tiny_llama / "config.json").read_text())
    (patient / "config.json").unlink()
    (patient / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 20_000, "eos_token_id": 511}))
    limits = ("--max-new-tokens", "15000", "--threads", "1", "--max-batch-size", "1", "--max-total-tokens", "16000")
    terminal = Terminal("chat", patient, *limits, home=tmp_path)
    terminal.wait_for("> ")
    for _ in range(10):  # a key that comes while Python still sets up its line editor is not seen before the next key
        terminal.type("\x03")
        until = time.monotonic() + 2
        while "> " not in terminal.unread and time.monotonic() < until:
            terminal.read(0.1)
        if "> " in terminal.unread:
            break
    while terminal.read(0.5):  # a prompt for each of them
        pass
    terminal.wait_for("> ")
    for question in ("the quick brown fox", "seven wizards"):
        terminal.type(f"{question}\n")
        terminal.wait_for(f"{question}\r\n")
        while len(terminal.unread) < 20:
            terminal.read(0.1)
        since = time.monotonic()
        terminal.process.send_signal(signal.SIGINT)
        part = terminal.wait_for("\r\n> ")
        assert time.monotonic() - since < 3
        assert 20 <= len(part) < 30_000
    terminal.type("\x04")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.seen


def test_a_server_by_url_its_key_found_by_itself(server: Serving, greedy: dict[str, Any]) -> None:
    url = server.ready["url"]
    expected = {**greedy, "model": "tiny"}
    for args in (
        ["--url", url, QUESTION],
        ["tiny", QUESTION, "--url", url],
        [QUESTION, "--url", url + "/v1/"],
        [QUESTION, "--url", url.removeprefix("http://")],
        [QUESTION, "--url", url, "--api-key-file", server.ready["key_file"]],
    ):
        assert answer(*args, *SHORT, "--temperature", "0", home=server.home) == expected
    piped = answer("tiny", "--url", url, *SHORT, "--temperature", "0", home=server.home, stdin=QUESTION.encode())
    assert piped == expected


def test_a_server_at_a_unix_socket(socket_server: Serving, greedy: dict[str, Any]) -> None:
    path = socket_server.ready["uds"]
    for args in (["--uds", path], ["--url", f"http+unix://{quote(path, safe='')}"]):
        found = answer(QUESTION, *args, *SHORT, "--temperature", "0", home=socket_server.home)
        assert found == {**greedy, "model": "tiny"}


def test_a_long_conversation_with_a_server_forgets_its_oldest_turns(server: Serving) -> None:
    terminal = Terminal("chat", "--url", server.ready["url"], *SHORT, home=server.home)
    terminal.wait_for("> ")
    for _ in range(12):
        terminal.type("seven wizards make toxic brew for an evil queen " * 3 + "\n")
        assert "refuses" not in terminal.wait_for("> ")
    terminal.type("/exit\n")
    assert terminal.end() == 0


def test_servers_that_refuse(server: Serving, tmp_path: Path) -> None:
    url = server.ready["url"]
    check_error(penstock("chat", "--url", url, "hi", home=tmp_path), 3, "refuses the key", "No key was found")
    (tmp_path / "wrong").write_text("wrong\n")
    done = penstock("chat", "--url", url, "hi", "--api-key-file", tmp_path / "wrong", home=tmp_path)
    check_error(done, 3, "not this server's")
    done = penstock("chat", "--url", url, "hi", "--api-key-file", tmp_path / "gone", home=tmp_path)
    check_error(done, 3, "cannot be read")
    check_error(penstock("chat", "other", "hi", "--url", url, home=server.home), 4, "not have this model", "tiny")
    check_error(penstock("chat", "--url", url, "fox " * 3000, home=server.home), 2, "tokens")
    done = penstock("chat", "--url", "http://127.0.0.1:9", "hi", home=tmp_path)
    check_error(done, 3, "No server answers", "refused", "penstock serve")
    done = penstock("chat", "--uds", tmp_path / "none.sock", "hi", home=tmp_path)
    check_error(done, 3, "No server answers", "No such file")


def test_a_key_is_not_sent_to_whoever_else_listens(server: Serving) -> None:
    """A stranger on another loopback port gets no key, even with a key file of ours at hand."""
    heard = []
    with socket.create_server(("127.0.0.1", 0)) as stranger:

        def listen() -> None:
            connection, _ = stranger.accept()
            with connection:
                heard.append(connection.recv(65536))
                connection.sendall(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=listen)
        thread.start()
        url = f"http://127.0.0.1:{stranger.getsockname()[1]}"
        done = penstock("chat", "--url", url, "hi", home=server.home)
        thread.join(10)
    check_error(done, 3, "No key was found")
    assert b"GET /v1/models" in heard[0]
    assert b"uthorization" not in heard[0]


def test_an_answer_broken_off_is_an_error(tmp_path: Path) -> None:
    """A server that dies in the middle of a stream."""
    with socket.create_server(("127.0.0.1", 0)) as dying:

        def serve() -> None:
            for body in (
                b'HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n{"data": [{"id": "one"}]}'[:-1],
                b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
                b'37\r\ndata: {"choices": [{"delta": {"content": "Half an"}}]}\n\r\n',
            ):
                connection, _ = dying.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(body)

        thread = threading.Thread(target=serve)
        thread.start()
        done = penstock("chat", "--url", f"http://127.0.0.1:{dying.getsockname()[1]}", "hi", home=tmp_path)
        thread.join(10)
    assert done.stdout == b"Half an"
    assert done.returncode == 1
    assert b"Error: " in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_oldest_turn_goes_first() -> None:
    def roles(messages: list[Message]) -> str:
        return " ".join(m["content"] for m in messages)

    messages = [{"role": r, "content": c} for r, c in zip(["system", "user", "assistant", "user"], "sqar", strict=True)]
    assert drop_oldest(messages)
    assert roles(messages) == "s r"
    assert not drop_oldest(messages)
    assert not drop_oldest(messages[1:])


def test_a_model_cannot_drive_the_terminal() -> None:
    assert terminal_safe("a\x1b[2J\x07\r\n\tü") == "a\\x1b[2J\\x07\\r\n\tü"
