"""Tokens are counted, not chunks, whatever a server's events look like."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.bench.load import Record, Slo
from penstock.bench.wire import APIS, Tally


def read(api: str, *events: tuple[float, Any]) -> Tally:
    tally = Tally()
    for moment, event in events:
        data = event if isinstance(event, bytes) else json.dumps(event).encode()
        APIS[api].read(b" " + data, moment, tally)
    return tally


def test_tgi_events_are_tokens() -> None:
    token = {"index": 1, "token": {"id": 5, "text": " a", "logprob": -1.0, "special": False}, "generated_text": None}
    last = {**token, "details": {"finish_reason": "length", "generated_tokens": 3, "seed": None, "input_length": 7}}
    tally = read("tgi", (1.0, token), (2.0, token), (2.0, last))
    assert (tally.tokens, tally.prompt_tokens, tally.told, tally.error) == (3, 7, True, None)
    assert tally.times == [(1.0, 1), (2.0, 3)]
    assert tally.gaps() == [(0.5, 2)]  # two came together: each took half the time


def test_tgi_error_in_the_stream() -> None:
    assert read("tgi", (1.0, {"error": "out of memory", "error_type": "generation"})).error == "out of memory"


def chunk(text: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": None}], **more}


def usage(n: int) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 9, "completion_tokens": n, "total_tokens": 9 + n}}


def test_running_usage() -> None:
    """vLLM and Penstock tell the tokens so far with each chunk; a chunk may have several."""
    last = {"choices": [], **usage(4)}
    events = [(1.0, chunk("a", **usage(1))), (2.0, chunk("bcd", **usage(4))), (2.1, last), (2.1, b"[DONE]")]
    tally = read("completions", *events)
    assert (tally.tokens, tally.prompt_tokens, tally.told) == (4, 9, True)
    assert tally.gaps() == [(pytest.approx(1 / 3), 3)]


def test_usage_at_the_end_only() -> None:
    """Three chunks of text held nine tokens."""
    tally = read("completions", *((float(i), chunk("x")) for i in range(3)), (3.0, {"choices": [], **usage(9)}))
    assert (tally.tokens, tally.seen, tally.told) == (9, 3, True)
    assert tally.gaps() == [(pytest.approx(1 / 3), 3), (pytest.approx(1 / 3), 3)]


def test_no_usage_at_all() -> None:
    tally = read("completions", (0.0, chunk("x")), (1.0, chunk("y")), (1.5, b"[DONE]"))
    assert (tally.tokens, tally.told) == (2, False)


def test_chat_begins_with_the_first_words() -> None:
    """The chunk with the role is no token; reasoning and calls of tools are."""
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "Hi"},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]},
        {},
    ]
    tally = read("chat", *((float(i), {"choices": [{"index": 0, "delta": d}]}) for i, d in enumerate(deltas)))
    assert tally.times == [(1.0, 1), (2.0, 2), (3.0, 3)]


def test_openai_error_in_the_stream() -> None:
    assert "overloaded" in str(read("chat", (1.0, {"error": {"message": "overloaded"}})).error)


def test_goodput_needs_every_limit() -> None:
    record = Record(due=0.0, sent=0.0, end=1.0, outcome="ok", first=0.1, output_tokens=10)
    assert Slo(ttft=100, itl=100, e2e=1000).kept(record)
    assert not Slo(ttft=99).kept(record)
    assert not Slo(itl=99.9).kept(record)
    assert not Slo(e2e=999).kept(record)
    assert not Slo(itl=1000).kept(Record(due=0.0, sent=0.0, end=1.0, outcome="ok"))
