"""The native API over HTTP, against TGI's documented wire format."""

from __future__ import annotations

import json
import math
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from .running import Server

GREEDY = {"max_new_tokens": 8, "details": True}
PROMPT = "the quick brown fox"


def generate(server: Server, prompt: str = PROMPT, **parameters: Any) -> Any:
    answer = server.post("/generate", {"inputs": prompt, "parameters": parameters})
    assert answer.status == 200, answer.text
    return answer.json()


def test_generate_has_tgis_fields_in_tgis_order(server: Server) -> None:
    answer = server.post("/generate", {"inputs": PROMPT, "parameters": GREEDY})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    value = answer.json()
    assert list(value) == ["generated_text", "details"]
    details = value["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("length", 8, None)
    assert details["prefill"] == []
    assert [list(token) for token in details["tokens"]] == [["id", "text", "logprob", "special"]] * 8
    assert "".join(t["text"] for t in details["tokens"] if not t["special"]) == value["generated_text"]
    assert b": " not in answer.body.replace(b'": "', b"")  # compact
    for header in ("x-compute-type", "x-compute-time", "x-compute-characters", "x-total-time"):
        assert header in answer.headers
    for header in ("x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token"):
        assert answer.headers[header].isdigit()
    assert answer.headers["x-prompt-tokens"] == str(len(tokenizer_ids(server, PROMPT)))
    assert answer.headers["x-generated-tokens"] == "8"
    assert answer.headers["x-compute-characters"] == str(len(PROMPT))


def tokenizer_ids(server: Server, text: str) -> list[int]:
    return [token["id"] for token in server.post("/tokenize", {"inputs": text}).json()]


def test_without_details_there_is_only_the_text(server: Server) -> None:
    assert list(generate(server, max_new_tokens=2)) == ["generated_text"]


def test_logprobs_are_32_bit_floats_in_shortest_form(server: Server) -> None:
    raw = server.post("/generate", {"inputs": PROMPT, "parameters": GREEDY}).text
    for token in json.loads(raw, parse_float=str)["details"]["tokens"]:
        digits = token["logprob"].lstrip("-").replace(".", "").lstrip("0")
        assert len(digits) <= 9, token


def test_absent_parameters_sample_and_empty_ones_do_not(server: Server) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "details": True}}
    assert server.post("/generate", body).json()["details"]["seed"] is None
    # An absent object samples, so two answers of some length differ.
    texts = {server.post("/generate", {"inputs": PROMPT * 20}).json()["generated_text"] for _ in range(2)}
    assert len(texts) == 2


def test_streaming_equals_whole_answers(server: Server) -> None:
    whole = generate(server, **GREEDY)
    answer = server.post("/generate_stream", {"inputs": PROMPT, "parameters": GREEDY})
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    events = answer.events()
    assert "[DONE]" not in events
    assert [event["index"] for event in events] == list(range(1, 9))
    assert [event["token"] for event in events] == whole["details"]["tokens"]
    assert [list(event) for event in events] == [["index", "token", "generated_text", "details"]] * 8
    assert all(e["generated_text"] is None and e["details"] is None for e in events[:-1])
    assert events[-1]["generated_text"] == whole["generated_text"]
    details = events[-1]["details"]
    assert list(details) == ["finish_reason", "generated_tokens", "seed", "input_length"]
    assert details["input_length"] == len(tokenizer_ids(server, PROMPT))


def test_a_stream_for_http_1_0_has_no_chunks(server: Server) -> None:
    """It ends with the connection, as old clients and proxies expect."""
    body = json.dumps({"inputs": PROMPT, "parameters": GREEDY})
    head = f"POST /generate_stream HTTP/1.0\r\nAuthorization: Bearer {server.key}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        answer, _, stream = b"".join(iter(lambda: sock.recv(65536), b"")).partition(b"\r\n\r\n")
    assert b"connection: close" in answer
    assert b"transfer-encoding" not in answer
    assert stream == server.post("/generate_stream", body).body


def test_the_root_route_answers_a_list_or_a_stream(server: Server) -> None:
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4}}
    whole = server.post("/", body).json()
    text = generate(server, max_new_tokens=4)["generated_text"]
    assert whole == [{"generated_text": PROMPT + text}]
    not_full = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4, "return_full_text": False}}
    assert server.post("/", not_full).json() == [{"generated_text": text}]
    events = server.post("/", {**not_full, "stream": True}).events()
    assert events[-1]["generated_text"] == text


def test_return_full_text(server: Server) -> None:
    text = generate(server, max_new_tokens=4)["generated_text"]
    assert generate(server, max_new_tokens=4, return_full_text=True)["generated_text"] == PROMPT + text


def test_a_seed_repeats_and_is_reported(server: Server) -> None:
    first = generate(server, max_new_tokens=12, do_sample=True, seed=7, temperature=1.5, details=True)
    again = generate(server, max_new_tokens=12, do_sample=True, seed=7, temperature=1.5, details=True)
    other = generate(server, max_new_tokens=12, do_sample=True, temperature=1.5, details=True)
    assert first == again
    assert first["details"]["seed"] == 7
    assert other["details"]["seed"] != 7
    assert other["generated_text"] != first["generated_text"]


def test_best_of_returns_the_likeliest(server: Server) -> None:
    value = generate(server, max_new_tokens=6, do_sample=True, best_of=2, details=True, temperature=2.0)
    details = value["details"]
    (other,) = details["best_of_sequences"]
    keys = ["generated_text", "finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert list(other) == keys
    assert other["seed"] != details["seed"]

    def mean(sequence: Any) -> float:
        return math.fsum(t["logprob"] for t in sequence["tokens"]) / len(sequence["tokens"])

    assert mean(details) >= mean(other)


def test_a_stop_string_stays_and_ends_the_text(server: Server) -> None:
    whole = generate(server, max_new_tokens=24)["generated_text"]
    stop = whole[7:10]
    value = generate(server, max_new_tokens=24, stop=[stop], details=True)
    assert value["generated_text"] == whole[: whole.index(stop) + len(stop)]
    assert value["details"]["finish_reason"] == "stop_sequence"
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 24, "stop": [stop], "details": True}}
    events = server.post("/generate_stream", body).events()
    assert [event["token"] for event in events] == value["details"]["tokens"]
    assert events[-1]["generated_text"] == value["generated_text"]
    assert events[-1]["details"]["finish_reason"] == "stop_sequence"


def test_top_tokens_hold_the_greedy_choice_first(server: Server) -> None:
    details = generate(server, **GREEDY, top_n_tokens=3)["details"]
    assert len(details["top_tokens"]) == 8
    for token, top in zip(details["tokens"], details["top_tokens"], strict=True):
        assert len(top) >= 3
        assert top[0]["id"] == token["id"]
        assert top[0]["logprob"] == token["logprob"]
        assert [t["logprob"] for t in top] == sorted((t["logprob"] for t in top), reverse=True)
    events = server.post("/generate_stream", {"inputs": PROMPT, "parameters": {**GREEDY, "top_n_tokens": 3}}).events()
    assert [event["top_tokens"] for event in events] == details["top_tokens"]


def test_the_prompts_logprobs(server: Server) -> None:
    details = generate(server, max_new_tokens=1, decoder_input_details=True)["details"]
    prefill = details["prefill"]
    assert [token["id"] for token in prefill] == tokenizer_ids(server, PROMPT)
    assert prefill[0]["logprob"] is None
    assert all(token["logprob"] < 0 for token in prefill[1:])
    assert prefill[0]["text"] == "<s>"


def test_truncate_keeps_the_end_of_the_prompt(server: Server) -> None:
    kept = generate(server, "lazy dog " + PROMPT, max_new_tokens=1, truncate=4, decoder_input_details=True)
    ids = tokenizer_ids(server, "lazy dog " + PROMPT)
    assert [token["id"] for token in kept["details"]["prefill"]] == [ids[0], *ids[-3:]]


def test_unset_max_new_tokens_fills_the_context(server: Server) -> None:
    body = {"inputs": PROMPT, "parameters": {"details": True}}
    details = server.post("/generate", body).json()["details"]
    prompt = len(tokenizer_ids(server, PROMPT))
    if details["finish_reason"] == "length":
        assert details["generated_tokens"] == 512 - prompt


def test_tokenize_gives_byte_offsets(server: Server, tiny_llama: Path) -> None:
    text = "the café 🦝 fox"
    tokens = server.post("/tokenize", {"inputs": text}).json()
    expected = Tokenizer.from_file(str(tiny_llama / "tokenizer.json")).encode(text).ids
    assert [token["id"] for token in tokens] == expected
    assert tokens[0] == {"id": 0, "text": "", "start": 0, "stop": 0}
    raw = text.encode()
    for token in tokens[1:]:
        assert raw[token["start"] : token["stop"]].decode() == token["text"]


def test_info(server: Server, tiny_llama: Path) -> None:
    info = server.get("/info").json()
    assert list(info) == [
        "model_id", "model_sha", "model_pipeline_tag", "max_concurrent_requests", "max_best_of",
        "max_stop_sequences", "max_input_tokens", "max_total_tokens", "validation_workers",
        "max_client_batch_size", "router", "version", "sha", "docker_label",
    ]  # fmt: skip
    assert info["model_id"] == str(tiny_llama)
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (511, 512)


@pytest.mark.parametrize("path", ["/health", "/ping", "/"])
def test_health(server: Server, path: str) -> None:
    answer = server.get(path)
    assert (answer.status, answer.body) == (200, b"")
    assert server.ask("HEAD", path).status == 200


def test_unknown_routes_and_wrong_methods(server: Server) -> None:
    answer = server.get("/nothing")
    assert (answer.status, answer.body) == (404, b"")
    answer = server.get("/generate")
    assert (answer.status, answer.body, answer.headers["allow"]) == (405, b"", "POST")
    assert server.get("/v1/nothing").json()["error"]["code"] == "not_found"


HISTOGRAMS = [
    "request_duration", "request_validation_duration", "request_queue_duration", "request_inference_duration",
    "request_mean_time_per_token_duration", "request_input_length", "request_generated_tokens",
    "request_max_new_tokens", "batch_next_size", "batch_inference_duration", "batch_forward_duration",
    "batch_decode_duration", "batch_filter_duration", "batch_concat_duration",
]  # fmt: skip
COUNTERS = [
    "request_count", "request_success", "request_failure", "batch_inference_count", "batch_inference_success",
    "batch_inference_failure", "batch_concat",
]  # fmt: skip
GAUGES = ["queue_size", "batch_current_size", "batch_current_max_tokens"]


def test_metrics_have_tgis_names_types_and_buckets(server: Server) -> None:
    before = server.metric("tgi_request_success")
    generate(server, **GREEDY)
    answer = server.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.text
    assert server.metric("tgi_request_success") == before + 1
    kinds = {"histogram": HISTOGRAMS, "counter": COUNTERS, "gauge": GAUGES, "summary": ["request_skipped_tokens"]}
    for kind, names in kinds.items():
        for name in names:
            assert f"# TYPE tgi_{name} {kind}\n" in text
            assert f"# HELP tgi_{name} " in text
    assert len(re.findall('tgi_request_duration_bucket{le="', text)) == 36  # 35 and infinity
    assert 'tgi_request_duration_bucket{le="0.00015000000000000001"}' in text
    assert len(re.findall('tgi_request_input_length_bucket{le="', text)) == 101
    assert len(re.findall('tgi_batch_next_size_bucket{le="', text)) == 1025
    assert 'tgi_request_skipped_tokens{quantile="0.999"} 0.0' in text
    for method in ("prefill", "decode"):
        assert server.metric(f'tgi_batch_inference_count{{method="{method}"}}') > 0
        assert server.metric(f'tgi_batch_forward_duration_count{{method="{method}"}}') > 0
    for name in ("time_to_first_token_seconds", "inter_token_seconds"):
        assert f"# TYPE penstock_{name} histogram" in text
    assert 0 <= server.metric("penstock_prefix_hit_ratio") <= 1
    assert server.metric("penstock_kv_used_ratio") == 0
    total = server.metric("penstock_kv_blocks_capacity")
    blocks = [server.metric(f'penstock_kv_blocks{{state="{s}"}}') for s in ("free", "cached", "used")]
    assert sum(blocks) == total > 0


def test_request_ids_are_echoed_or_made(server: Server) -> None:
    assert server.get("/health", x_request_id="abc-1").headers["x-request-id"] == "abc-1"
    made = server.get("/health", x_request_id="bad id").headers["x-request-id"]
    assert len(made) == 32


def test_a_deterministic_request_has_the_same_bits_in_company(server: Server) -> None:
    """Alone, and among others, on the native and on OpenAI's routes; draws without a seed are those of seed 0."""
    asked = {"max_new_tokens": 12, "details": True, "deterministic": True, "temperature": 0.9}
    chosen = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0.9, "deterministic": True, "logprobs": 1}

    def both() -> tuple[Any, Any]:
        native, completion = generate(server, **asked), server.post("/v1/completions", chosen)
        assert completion.status == 200, completion.text
        return native["details"]["tokens"], completion.json()["choices"][0]["logprobs"]

    alone = both()
    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(generate, server, PROMPT * n, max_new_tokens=40) for n in range(1, 7)]
        for _ in range(3):
            assert both() == alone
        for other in others:
            other.result()
    assert [token["logprob"] for token in alone[0]] == pytest.approx(alone[1]["token_logprobs"])
    refused = server.post("/generate", {"inputs": PROMPT, "parameters": {"deterministic": "yes"}})
    assert refused.status == 422
