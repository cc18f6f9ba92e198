"""What of TGI is easily lost: rules in their order, limits of flags, the bytes of streams, the order of fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from .running import Server, start

FLAGS = """--no-auth --enable-prefill-logprobs --max-top-n-tokens 7 --max-client-batch-size 2 --max-stop-sequences 1
    --max-total-tokens 64 --max-input-tokens 40 --payload-limit 5000 --max-concurrent-requests 3
    --disable-grammar-support --cors-allow-origin https://a.example"""
HELLO = "Hello world"
CHAT = [{"role": "user", "content": "What does sinfo do?"}]
BEST = {"best_of": 2, "do_sample": True}
MISFIT = "Failed to deserialize the JSON body into the target type: "


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model behind narrow limits, without a key."""
    found = start(tmp_path_factory.mktemp("home"), "demo", *FLAGS.split())
    yield found
    found.kill()


def details(server: Server, inputs: str = HELLO, **parameters: Any) -> Any:
    asked = {"max_new_tokens": 4, "details": True, **parameters}
    answer = server.post("/generate", {"inputs": inputs, "parameters": asked})
    assert answer.status == 200, answer.text
    return answer.json()["details"]


def chat_prompt(server: Server) -> str:
    text: str = server.post("/chat_tokenize", {"messages": CHAT}).json()["templated_text"]
    return text


# Each request breaks two rules or more; the first in TGI's order is the one that is told.
ORDER: list[tuple[dict[str, Any], str]] = [
    ({"best_of": 3, "temperature": 0}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2, "repetition_penalty": 0}, "you must use sampling when `best_of` is > 1"),
    ({"temperature": 0, "repetition_penalty": 0}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0, "frequency_penalty": 3}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 3, "top_p": 1}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_p": 1, "typical_p": 1}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 1, "top_k": 0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"top_k": 0, "max_new_tokens": 0}, "`top_k` must be strictly positive"),
    ({"max_new_tokens": 0, "stop": ["a", "b"]}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ["a", "b"], "seed": 1, **BEST}, "`stop` supports up to 1 stop sequences. Given: 2"),
    ({"seed": 1, **BEST, "top_n_tokens": 8}, "`seed` must not be set when `best_of` > 1"),
    ({"top_n_tokens": 8, "truncate": 0}, "`top_n_tokens` must be >= 0 and <= 7. Given: 8"),
    ({"truncate": 0}, "`inputs` cannot be empty"),
]


@pytest.mark.parametrize(("parameters", "words"), ORDER)
def test_the_first_broken_rule_is_told(limited: Server, parameters: dict[str, Any], words: str) -> None:
    answer = limited.post("/generate", {"inputs": "", "parameters": parameters})
    assert answer.status == 422
    assert answer.text == json.dumps(
        {"error": f"Input validation error: {words}", "error_type": "validation"}, separators=(",", ":")
    )


def test_the_last_rules_look_at_tokens(limited: Server) -> None:
    long = "word " * 45
    count = len(limited.post("/tokenize", {"inputs": long}).json())
    assert 40 < count < 60

    def error(**parameters: Any) -> str:
        answer = limited.post("/generate", {"inputs": long, "parameters": parameters})
        assert answer.status == 422
        text: str = answer.json()["error"]
        return text.removeprefix("Input validation error: ")

    grammar = {"type": "regex", "value": "a"}
    assert error(truncate=41) == "`truncate` must be strictly positive and less than 40. Given: 41"
    assert error(max_new_tokens=60, grammar=grammar) == (
        f"`inputs` tokens + `max_new_tokens` must be <= 64. Given: {count} `inputs` tokens and 60 `max_new_tokens`"
    )
    assert error(max_new_tokens=1, grammar=grammar) == f"`inputs` must have less than 40 tokens. Given: {count}"
    assert error(max_new_tokens=1, grammar=grammar, truncate=40) == "grammar is not supported"


def test_flags_are_told_and_kept(limited: Server) -> None:
    info = limited.get("/info").json()
    assert (info["max_input_tokens"], info["max_total_tokens"]) == (40, 64)
    assert (info["max_concurrent_requests"], info["max_stop_sequences"], info["max_client_batch_size"]) == (3, 1, 2)
    many = limited.post("/v1/completions", {"prompt": ["a", "b", "c"]})
    assert many.json()["error"]["message"] == "Number of prompts exceeds the maximum allowed batch size of 2"
    assert limited.post("/vertex", {"instances": [{"inputs": "a"}] * 4}).status == 429
    for path in ("/generate", "/generate_stream", "/", "/tokenize", "/vertex"):
        large = limited.post(path, '{"inputs":"' + "x" * 5000 + '"}')
        assert (large.status, large.text) == (413, "Failed to buffer the request body: length limit exceeded")


def test_without_grammars_no_route_takes_one(limited: Server) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    for path, body in (
        ("/v1/chat/completions", {"messages": CHAT, "response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {"messages": CHAT, "tools": [tool], "tool_choice": "required"}),
        ("/v1/completions", {"prompt": "a", "guided_regex": "a"}),
    ):
        answer = limited.post(path, body)
        assert answer.status == 422
        assert answer.json()["error"]["message"] == "Input validation error: grammar is not supported"


def test_preflights(limited: Server) -> None:
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    known = limited.ask("OPTIONS", "/generate", None, Origin="https://a.example", **asked)
    assert known.status == 200
    assert known.headers["access-control-allow-origin"] == "https://a.example"
    assert known.headers["access-control-allow-methods"] == "GET,POST"
    assert "content-type" in known.headers["access-control-allow-headers"]
    other = limited.ask("OPTIONS", "/generate", None, Origin="https://b.example", **asked)
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("HEAD", "/generate", "POST"),
        ("PUT", "/generate", "POST"),
        ("GET", "/chat_tokenize", "POST"),
        ("GET", "/v1/completions", "POST"),
        ("POST", "/health", "GET,HEAD"),
        ("POST", "/v1/models", "GET,HEAD"),
        ("DELETE", "/", "GET,HEAD,POST"),
    ],
)
def test_wrong_methods(limited: Server, method: str, path: str, allow: str) -> None:
    answer = limited.ask(method, path)
    assert (answer.status, answer.headers["allow"], answer.body) == (405, allow, b"")


@pytest.mark.parametrize(
    ("path", "raw", "words"),
    [
        ("/", "7", "invalid type: integer `7`, expected struct CompatGenerateRequest at line 1 column 1"),
        ("/", '{"inputs":"x","stream":null}', "stream: invalid type: null, expected a boolean at line 1 column 27"),
        ("/vertex", "{}", "missing field `instances` at line 1 column 2"),
        ("/chat_tokenize", '{"messages":[{"content":"x"}]}', "messages[0]: missing field `role` at line 1 column 28"),
        (
            "/generate",
            '{"inputs":"x","parameters":{"stop":["a",5]}}',
            "parameters.stop[1]: invalid type: integer `5`, expected a string at line 1 column 41",
        ),
        (
            "/generate",
            '{"inputs":"x","parameters":{"seed":1,"seed":2}}',
            "parameters: duplicate field `seed` at line 1 column 43",
        ),
    ],
)
def test_misfits_of_other_routes(limited: Server, path: str, raw: str, words: str) -> None:
    answer = limited.post(path, raw)
    assert (answer.status, answer.text) == (422, MISFIT + words)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    ("parameters", "samples"),
    [
        ({}, False),
        ({"seed": 5}, False),
        ({"temperature": 1.0}, False),
        ({"temperature": 0.5}, True),
        ({"top_k": 5}, True),
        ({"top_p": 0.5}, True),
        ({"typical_p": 0.5}, True),
        ({"do_sample": True}, True),
    ],
)
def test_what_samples_has_a_seed(limited: Server, parameters: dict[str, Any], samples: bool) -> None:
    assert (details(limited, HELLO, **parameters)["seed"] is not None) is samples


def test_log_probabilities_are_of_what_is_left(limited: Server) -> None:
    answer = limited.post(
        "/generate", {"inputs": HELLO, "parameters": {"max_new_tokens": 1, "details": True, "top_k": 1}}
    )
    assert '"logprob":0.0,"special":false}' in answer.text


def test_length_outranks_the_end_of_text(limited: Server) -> None:
    prompt = chat_prompt(limited)
    whole = details(limited, prompt, max_new_tokens=40)
    assert whole["finish_reason"] == "eos_token"
    assert whole["tokens"][-1]["special"] is True
    cut = details(limited, prompt, max_new_tokens=whole["generated_tokens"])
    assert cut["tokens"] == whole["tokens"]
    assert cut["finish_reason"] == "length"


def test_fields_of_the_runners_up(limited: Server) -> None:
    found = details(limited, HELLO, **BEST, top_n_tokens=2, decoder_input_details=True)
    shared = ["finish_reason", "generated_tokens", "seed", "prefill", "tokens"]
    assert list(found) == [*shared, "best_of_sequences", "top_tokens"]
    (other,) = found["best_of_sequences"]
    assert list(other) == ["generated_text", *shared, "top_tokens"]
    assert other["prefill"] == found["prefill"]
    assert [list(token) for token in found["prefill"][:1]] == [["id", "text", "logprob"]]
    assert other["seed"] != found["seed"]


def test_a_native_stream_byte_by_byte(limited: Server) -> None:
    parameters = {"max_new_tokens": 2, "details": True}
    first, second = details(limited, max_new_tokens=2)["tokens"]
    text = first["text"] + second["text"]
    count = len(limited.post("/tokenize", {"inputs": HELLO}).json())
    last = {"finish_reason": "length", "generated_tokens": 2, "seed": None, "input_length": count}
    expected = b""
    for event in (
        {"index": 1, "token": first, "generated_text": None, "details": None},
        {"index": 2, "token": second, "generated_text": text, "details": last},
    ):
        expected += b"data: " + json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"
    answer = limited.post("/generate_stream", {"inputs": HELLO, "parameters": parameters})
    assert answer.body == expected
    assert answer.headers["content-type"] == "text/event-stream"
    assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
    assert answer.headers["x-compute-characters"] == str(len(HELLO))
    assert "x-compute-time" not in answer.headers


def test_chunks_of_text_completions(limited: Server) -> None:
    body: dict[str, Any] = {"prompt": HELLO, "max_tokens": 2, "temperature": 0, "stream": True}
    fields = ["object", "id", "created", "choices", "model", "system_fingerprint"]
    chunks = limited.post("/v1/completions", body).events()
    assert [list(chunk) for chunk in chunks[:-1]] == [fields] * 2
    counted = limited.post("/v1/completions", {**body, "stream_options": {"include_usage": True}}).events()
    assert [list(chunk) for chunk in counted[:-1]] == [[*fields, "usage"]] * 3
    assert [chunk["usage"] for chunk in counted[:2]] == [None, None]
    assert (counted[2]["choices"], counted[2]["usage"]["completion_tokens"]) == ([], 2)


def test_headers_of_text_completions_are_sums(limited: Server) -> None:
    answer = limited.post("/v1/completions", {"prompt": ["a", HELLO], "max_tokens": 2, "ignore_eos": True})
    assert answer.headers["x-generated-tokens"] == "4"
    assert answer.headers["x-prompt-tokens"] == str(answer.json()["usage"]["prompt_tokens"])
    assert "x-compute-time" not in answer.headers


def test_the_last_words_of_an_assistant_are_continued(limited: Server) -> None:
    parts = [{"type": "text", "text": "aa"}, {"type": "text", "text": "bb"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "It is "}]
    text = limited.post("/chat_tokenize", {"messages": messages}).json()["templated_text"]
    assert "aabb" in text
    assert text.endswith("It is")


def test_tokenize_checks_types_alone(limited: Server) -> None:
    answer = limited.post("/tokenize", {"inputs": "", "parameters": {"temperature": 0, "truncate": 0}})
    assert answer.status == 200
    long = limited.post("/tokenize", {"inputs": "word " * 500, "parameters": {"truncate": 1}})
    assert len(long.json()) > 64


def test_what_counts_as_a_request(limited: Server) -> None:
    limited.wait_idle()
    before = limited.metric("tgi_request_count")
    limited.post("/tokenize", {"inputs": HELLO})
    assert limited.metric("tgi_request_count") == before
    limited.post("/chat_tokenize", {"messages": CHAT})
    assert limited.metric("tgi_request_count") == before + 1
    limited.post("/generate", {"inputs": HELLO, "parameters": {"temperature": 0}})
    assert limited.metric("tgi_request_count") == before + 2
