"""Every field with every kind of value, and 500 broken bodies: nothing is our fault, nobody else is harmed."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .running import Answer, Server

NUMBERS = [-1, 0, 1, -1e-7, 1.0000001, 2**31, 2**32, 2**63, 2**64, 1e308, -1e308, 1e-320, 10**400]
OTHERS: list[Any] = [None, True, "1", "", [], {}, [1], {"a": 1}, 0.5]
RAW = ["NaN", "Infinity", "-Infinity", "1e999", "01", "-", '"\\ud800"', "9" * 10_000]
NATIVE = [
    "best_of", "temperature", "repetition_penalty", "frequency_penalty", "top_k", "top_p", "typical_p", "do_sample",
    "max_new_tokens", "return_full_text", "stop", "truncate", "watermark", "details", "decoder_input_details", "seed",
    "top_n_tokens", "grammar", "adapter_id", "deterministic",
]  # fmt: skip
OPENAI = [
    "model", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "logprobs", "logit_bias",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "stream", "stream_options", "ignore_eos",
    "min_tokens", "stop_token_ids", "response_format", "user", "deterministic",
]  # fmt: skip
CHAT = [
    "top_logprobs",
    "tools",
    "tool_choice",
    "tool_prompt",
    "messages",
    "max_completion_tokens",
    "chat_template_kwargs",
]
COMPLETION = ["prompt", "suffix", "echo", "best_of"]
EDGES: list[Any] = [
    "",
    [],
    [[]],
    [""],
    "x" * 3000,
    [0] * 600,
    [-1],
    [511],
    [512],
    [2**31],
    [[1], [2]],
    ["a"] * 5,
    [None],
]
CANARY = {"inputs": "the quick brown fox", "parameters": {"max_new_tokens": 12, "details": True}}


class Talk:
    """Many requests over one connection."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._connection = server.connection()
        self._headers = {**server.headers(), "Content-Type": "application/json"}

    def post(self, path: str, raw: str | bytes, **headers: str) -> Answer:
        sent = {**self._headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        try:
            self._connection.request("POST", path, raw, sent)
            response = self._connection.getresponse()
        except (http.client.HTTPException, OSError):  # the server closed it after the answer before
            self._connection = self._server.connection()
            self._connection.request("POST", path, raw, sent)
            response = self._connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read())


@contextmanager
def canary(server: Server) -> Iterator[None]:
    """Meanwhile a greedy request runs again and again, and must never change."""
    talk, done, odd = Talk(server), threading.Event(), []
    expected = [t["id"] for t in talk.post("/generate", json.dumps(CANARY)).json()["details"]["tokens"]]

    def sing() -> None:
        while not done.is_set():
            answer = talk.post("/generate", json.dumps(CANARY))
            ids = [t["id"] for t in answer.json()["details"]["tokens"]] if answer.status == 200 else answer.text
            if ids != expected:
                odd.append(ids)
            done.wait(0.05)

    thread = threading.Thread(target=sing)
    engine = server.engine_pid()
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(30)
    assert not odd
    assert server.engine_pid() == engine
    assert "Traceback" not in server.errors
    server.wait_idle()


def cases() -> Iterator[tuple[str, str]]:
    """(path, body)."""
    values = [json.dumps(value) for value in [*NUMBERS, *OTHERS]] + RAW
    for field in NATIVE:
        for value in values:
            yield "/generate", f'{{"inputs":"the fox","parameters":{{"max_new_tokens":1,"{field}":{value}}}}}'
    head = {
        "/v1/chat/completions": '"messages":[{"role":"user","content":"a"}],"max_tokens":1',
        "/v1/completions": '"prompt":"a","max_tokens":1',
    }
    for path, fields in (("/v1/chat/completions", OPENAI + CHAT), ("/v1/completions", OPENAI + COMPLETION)):
        for field in fields:
            start = ",".join(part for part in head[path].split(",") if f'"{field}"' not in part)
            for value in values:
                yield path, f'{{{start},"{field}":{value}}}'.replace("{,", "{")
    for value in EDGES:
        yield "/v1/completions", json.dumps({"prompt": value, "max_tokens": 1})
        yield "/v1/embeddings", json.dumps({"input": value})
        yield "/generate", json.dumps({"inputs": value, "parameters": {"max_new_tokens": 1}})
        yield "/generate", json.dumps({"inputs": "a", "parameters": {"max_new_tokens": 1, "stop": value}})
        yield "/detokenize", json.dumps({"tokens": value})
        yield "/tokenize", json.dumps({"inputs": value})
    yield "/generate", json.dumps({"inputs": "a", "parameters": {"stop": ["x"] * 10_000}})


def test_no_value_of_any_field_is_our_fault(server: Server) -> None:
    asked = list(cases())
    assert len(asked) >= 1500
    with canary(server):
        talk = Talk(server)
        for path, body in asked:
            answer = talk.post(path, body)
            assert answer.status in (200, 400, 404, 422), (path, body[:200], answer.status, answer.text[:300])
            for trouble in ("Traceback", "site-packages", "0x7f"):
                assert trouble not in answer.text


def broken() -> Iterator[tuple[bytes, dict[str, str]]]:
    """(body, headers)."""
    body = {"inputs": "the fox é", "parameters": {"max_new_tokens": 2, "stop": ["é"], "seed": 3, "temperature": 0.5}}
    whole = json.dumps(body, ensure_ascii=False).encode()
    for path_length in range(len(whole)):
        yield whole[:path_length], {}
        yield whole[:path_length] + b"\xff" + whole[path_length:], {}
        yield whole[:path_length] + b"\x00" + whole[path_length:], {}
        yield whole[:path_length] + b'"' + whole[path_length:], {}
        yield whole[:path_length] + whole[path_length + 1 :], {}
    for depth in (100, 10_000, 1_000_000):
        yield b'{"inputs":"a","x":' + b"[" * depth, {}
        yield b'{"inputs":"a","x":' + b'{"a":' * (depth // 5), {}
    yield gzip.compress(whole), {"Content_Encoding": "gzip"}
    yield whole, {"Content_Type": "text/plain"}
    yield b'{"inputs":"' + b"a" * 3_000_000 + b'"}', {}
    yield b'{"inputs":"a","parameters":{"temperature":' + b"1" * 1_000_000 + b"}}", {}


def resident(pid: int) -> int:
    """Bytes."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def test_500_broken_bodies(server: Server) -> None:
    before = resident(server.process.pid)
    asked = list(broken())
    assert len(asked) >= 500
    with canary(server):
        talk = Talk(server)
        for body, headers in asked:
            began = time.monotonic()
            answer = talk.post("/generate", body, **headers)
            assert time.monotonic() - began < 1
            assert answer.status in (200, 400, 413, 415, 422), (body[:200], answer.status, answer.text[:300])
    assert resident(server.process.pid) - before < 50 * 2**20


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_100_megabytes_is_not_read(server: Server, chunked: bool) -> None:
    """Refused by its length, or once more than the limit has come; whoever goes on sending is cut off."""
    before = resident(server.process.pid)
    head = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.key}\r\n"
    head += "Content-Type: application/json\r\n"
    head += "Transfer-Encoding: chunked\r\n\r\n" if chunked else "Content-Length: 100000000\r\n\r\n"
    piece = b" " * 1_000_000
    piece = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
    with canary(server), socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(head.encode())
        began, cut = time.monotonic(), False
        try:
            for _ in range(100):
                sock.sendall(piece)
            answer = sock.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            answer, cut = b"", True
        assert cut or b" 413 " in answer, answer
        assert time.monotonic() - began < 1
    assert resident(server.process.pid) - before < 50 * 2**20
