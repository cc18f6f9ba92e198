"""Requests that must fail: with TGI's status and words, at once, and without harm to anybody else."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest

from .running import Server

FIT = "Failed to deserialize the JSON body into the target type: "
SYNTAX = "Failed to parse the request body as JSON: "


@pytest.fixture(autouse=True)
def canary(server: Server) -> Any:
    """Whatever a test sends: the next good request gets the same answer as the first."""
    yield
    answer = server.post("/generate", {"inputs": "the lazy dog", "parameters": {"max_new_tokens": 4}})
    assert answer.status == 200, answer.text


def body(**parameters: Any) -> dict[str, Any]:
    return {"inputs": "the fox", "parameters": {"max_new_tokens": 2, **parameters}}


RULES = [
    ({"temperature": 0}, "`temperature` must be strictly positive"),
    ({"temperature": -1.5}, "`temperature` must be strictly positive"),
    ({"temperature": 1e-320}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"top_p": 0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_k": -3}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"best_of": 2, "do_sample": True, "seed": 1}, "`seed` must not be set when `best_of` > 1"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 511. Given: 0"),
    ({"truncate": 512}, "`truncate` must be strictly positive and less than 511. Given: 512"),
    ({"adapter_id": "x"}, "`adapter_id`: there is no adapter `x` here. Adapters: none"),
    ({"temperature": 1e308}, "`temperature` must be a finite number"),
]


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
@pytest.mark.parametrize(("parameters", "words"), RULES)
def test_rules_in_tgis_words(server: Server, path: str, parameters: dict[str, Any], words: str) -> None:
    if path == "/generate_stream" and "best_of" in parameters:
        words = "`best_of` != 1 is not supported when streaming tokens"
    answer = server.post(path, body(**parameters))
    assert answer.status == 422, answer.text
    assert answer.json() == {"error": f"Input validation error: {words}", "error_type": "validation"}


def test_streams_refuse_what_they_cannot_do(server: Server) -> None:
    answer = server.post("/generate_stream", body(decoder_input_details=True))
    assert answer.status == 422
    assert "`decoder_input_details` == true is not supported when streaming" in answer.json()["error"]


def test_prompts_that_do_not_fit(server: Server) -> None:
    def error(inputs: str, **parameters: Any) -> str:
        answer = server.post("/generate", {"inputs": inputs, "parameters": parameters})
        assert answer.status == 422
        text: str = answer.json()["error"].removeprefix("Input validation error: ")
        return text

    assert error("") == "`inputs` cannot be empty"
    assert error("fox", max_new_tokens=511).startswith(
        "`inputs` tokens + `max_new_tokens` must be <= 512. Given: 2 `inputs` tokens and 511"
    ) or error("fox", max_new_tokens=512)
    long = " fox" * 600
    assert "must be <= 512. Given:" in error(long)
    assert "must be <= 512. Given:" in error(long, max_new_tokens=1)
    exact = " fox" * 511  # with BOS the whole context
    assert error(exact) == "`inputs` must have less than 511 tokens. Given: 512"


MISFITS = [
    ("{}", "missing field `inputs` at line 1 column 2"),
    ("[]", "invalid type: sequence, expected struct GenerateRequest at line 1 column 0"),
    ('{"inputs": 5}', "inputs: invalid type: integer `5`, expected a string at line 1 column 12"),
    ('{"inputs": null}', "inputs: invalid type: null, expected a string"),
    ('{"inputs":"a","parameters":null}', "parameters: invalid type: null, expected struct"),
    (
        '{"inputs":"a","parameters":{"temperature":"hot"}}',
        'parameters.temperature: invalid type: string "hot", expected f32',
    ),
    ('{"inputs":"a","parameters":{"top_k":1.5}}', "top_k: invalid type: floating point `1.5`, expected i32"),
    ('{"inputs":"a","parameters":{"seed":1.0}}', "seed: invalid type: floating point `1.0`, expected u64"),
    ('{"inputs":"a","parameters":{"seed":-1}}', "seed: invalid value: integer `-1`, expected u64"),
    ('{"inputs":"a","parameters":{"max_new_tokens":-1}}', "invalid value: integer `-1`, expected u32"),
    ('{"inputs":"a","parameters":{"max_new_tokens":4294967296}}', "integer `4294967296`, expected u32"),
    ('{"inputs":"a","parameters":{"best_of":99999999999999999999999}}', "expected usize"),
    ('{"inputs":"a","parameters":{"seed":18446744073709551616}}', "floating point `18446744073709552000.0`"),
    ('{"inputs":"a","parameters":{"do_sample":null}}', "invalid type: null, expected a boolean"),
    ('{"inputs":"a","parameters":{"do_sample":1}}', "invalid type: integer `1`, expected a boolean"),
    ('{"inputs":"a","parameters":{"stop":null}}', "invalid type: null, expected a sequence"),
    ('{"inputs":"a","parameters":{"stop":["a",3]}}', "stop[1]: invalid type: integer `3`, expected a string"),
    ('{"inputs":"a","inputs":"b"}', "duplicate field `inputs`"),
    ('{"inputs":"a","parameters":{"top_k":3,"top_k":4}}', "duplicate field `top_k`"),
]


@pytest.mark.parametrize(("raw", "words"), MISFITS)
def test_wrong_types_in_serdes_words(server: Server, raw: str, words: str) -> None:
    answer = server.post("/generate", raw)
    assert answer.status == 422, answer.text
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.text.startswith(FIT)
    assert words in answer.text


NOT_JSON = [
    b"",
    b"   ",
    b"{",
    b'{"inputs": "a"',
    b'{"inputs": "a"} x',
    b"nonsense",
    b'{"inputs": NaN}',
    b'{"inputs":"a","parameters":{"temperature":NaN}}',
    b'{"inputs":"a","parameters":{"temperature":Infinity}}',
    b'{"inputs":"a","parameters":{"temperature":-Infinity}}',
    b'{"inputs":"a","parameters":{"temperature":1e999}}',
    b'{"inputs":"\xff\xfe"}',
    b'{"inputs":"\\ud800"}',
    b'{"inputs":"\x00"}',
    b"\xef\xbb\xbf{}",
    b'{"inputs":' + b"[" * 100_000,
    b'{"inputs":"a","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"inputs":"a","x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
    b'{"inputs":"a","parameters":{"seed":' + b"9" * 10_000 + b"}}",
    b'{"inputs":"a","parameters":{"seed":' + b"9" * 400 + b"}}",
    b'{"messages":[{"role":"user","content":"a"}],"seed":' + b"9" * 400 + b"}",
]


@pytest.mark.parametrize("path", ["/generate", "/tokenize", "/v1/chat/completions"])
@pytest.mark.parametrize("raw", NOT_JSON, ids=range(len(NOT_JSON)))
def test_what_is_not_json(server: Server, raw: bytes, path: str) -> None:
    began = time.monotonic()
    answer = server.post(path, raw)
    assert time.monotonic() - began < 1
    assert answer.status in (400, 422), answer.text
    assert "Traceback" not in answer.text
    if path != "/v1/chat/completions":
        assert answer.text.startswith((SYNTAX, FIT))
    else:
        assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}


def test_the_empty_body_in_serdes_words(server: Server) -> None:
    assert server.post("/generate", b"").text == f"{SYNTAX}EOF while parsing a value at line 1 column 0"


def test_a_canonical_request_cut_at_every_byte(server: Server) -> None:
    raw = json.dumps(body(stop=["é"], seed=3), ensure_ascii=False).encode()
    for length in range(len(raw)):
        assert server.post("/generate", raw[:length]).status == 400


@pytest.mark.parametrize(
    "content_type", ["", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jso"]
)
def test_other_content_types(server: Server, content_type: str) -> None:
    answer = server.post("/generate", json.dumps(body()), Content_Type=content_type)
    assert answer.status == 415
    assert answer.text == "Expected request with `Content-Type: application/json`"


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "application/vnd.api+json"])
def test_json_content_types(server: Server, content_type: str) -> None:
    assert server.post("/generate", json.dumps(body()), Content_Type=content_type).status == 200


def test_a_body_over_the_limit(server: Server) -> None:
    answer = server.post("/generate", json.dumps({"inputs": "a" * 2_000_001}))
    assert answer.status == 413
    assert answer.text == "Failed to buffer the request body: length limit exceeded"


def test_a_chunked_body_is_counted_while_it_arrives(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(
            f"POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.key}\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
        for _ in range(64):
            sock.sendall(chunk)
        assert b" 413 " in sock.recv(4096)


@pytest.mark.parametrize("headers", ["X: " + "a" * 70_000 + "\r\n", "".join(f"X-{n}: a\r\n" for n in range(1000))])
def test_too_many_headers(server: Server, headers: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(f"GET /health HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())
        assert b" 431 " in sock.recv(4096)


def test_a_head_without_end(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        try:
            for _ in range(16):
                sock.sendall(b"a" * 16384)
        except (BrokenPipeError, ConnectionResetError):
            return
        assert b" 431 " in sock.recv(4096)


RAW = [
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://evil.example/metrics HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"\x00" * 100 + b"\r\n\r\n",
    b"GET /%ff%00%zz HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
]


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_malformed_http(server: Server, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 5) as sock:
        sock.sendall(raw)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while part := sock.recv(4096):
            answer += part
        status = answer.split()[1] if answer else b"closed"
        assert status in (b"200", b"400", b"401", b"404", b"405", b"413", b"415", b"closed"), answer
    assert "Traceback" not in server.errors


EXTREMES = [None, True, "1", [], {}, -1, 0, 1, 2**31, 2**63, 2**64, 1e-320, 1e308, -1e308, 0.5]
FIELDS = [
    "best_of", "temperature", "repetition_penalty", "frequency_penalty", "top_k", "top_p", "typical_p", "do_sample",
    "return_full_text", "stop", "truncate", "watermark", "details", "decoder_input_details", "seed", "top_n_tokens",
    "grammar", "adapter_id", "max_new_tokens", "deterministic",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_no_value_of_any_field_is_our_fault(server: Server, field: str) -> None:
    for value in EXTREMES:
        answer = server.post("/generate", body(**{field: value}))
        assert answer.status in (200, 422), (field, value, answer.text)
        assert "Traceback" not in answer.text


def test_hostile_stop_strings(server: Server) -> None:
    stops = ["a" * 400_000, "", "\ud7ff", "👩‍👩‍👧" * 1000]
    assert server.post("/generate", body(stop=stops)).status == 200
