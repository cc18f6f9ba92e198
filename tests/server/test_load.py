"""Many clients at once: right answers for all, a clean no for those too many, nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from .conftest import StartServer
from .running import Server

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "make",
    "toxic",
    "brew",
    "for",
    "an",
    "evil",
    "queen",
]


def prompts(count: int) -> list[str]:
    rng = random.Random(5)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 40))) for _ in range(count)]


def endless(content: str = "the fox", tokens: int = 60_000) -> dict[str, Any]:
    """A stream that only ends when somebody ends it."""
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }


def test_32_streams_equal_32_whole_answers(server: Server) -> None:
    bodies = [
        {"inputs": text, "parameters": {"max_new_tokens": 48, "details": True, "seed": n, "do_sample": n % 2 == 1}}
        for n, text in enumerate(prompts(32))
    ]

    async def all_of(path: str) -> list[Any]:
        return await asyncio.gather(*(server.post_async(path, body) for body in bodies))

    whole = [answer.json() for answer in asyncio.run(all_of("/generate"))]
    streams = [answer.events() for answer in asyncio.run(all_of("/generate_stream"))]
    alone = [server.post("/generate", body).json() for body in bodies]
    for expected, by_itself, events in zip(whole, alone, streams, strict=True):
        # Texts and tokens are equal whatever ran beside them; log-probabilities to what float32 sums allow.
        ids = [token["id"] for token in expected["details"]["tokens"]]
        assert [event["token"]["id"] for event in events] == ids
        assert [token["id"] for token in by_itself["details"]["tokens"]] == ids
        assert events[-1]["generated_text"] == expected["generated_text"] == by_itself["generated_text"]
        shown = "".join(e["token"]["text"] for e in events if not e["token"]["special"])
        assert shown == expected["generated_text"]
        assert events[-1]["details"]["finish_reason"] == expected["details"]["finish_reason"]
    server.wait_idle()


def test_too_many_get_429_at_once(start_server: StartServer, long_llama: Path) -> None:
    server = start_server(long_llama, "--max-concurrent-requests", "2", "--max-total-tokens", "65536")
    with server.stream("/v1/chat/completions", endless()) as first:
        assert first.status == 200
        best_of = {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True}}
        assert server.post("/generate", best_of).status == 429  # it needs two places
        with server.stream("/v1/chat/completions", endless()) as second:
            assert second.status == 200
            for path in ("/generate", "/generate_stream", "/"):
                answer = server.post(path, {"inputs": "a"})
                assert answer.status == 429
                assert answer.json() == {"error": "Model is overloaded", "error_type": "overloaded"}
                assert int(answer.headers["retry-after"]) >= 1
            openai = server.post("/v1/chat/completions", endless())
            assert openai.status == 429
            assert openai.json()["error"]["type"] == "rate_limit_error"
            assert int(openai.headers["retry-after"]) >= 1
            assert server.post("/tokenize", {"inputs": "a"}).status == 200  # takes no place
            assert server.get("/health").status == 200
    assert server.metric('tgi_request_failure{err="overloaded"}') == 5
    server.wait_idle()
    assert server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).status == 200
    assert server.metric('tgi_request_failure{err="dropped"}') == 2


def open_sockets(files: Path) -> int:
    """Among the files that a process holds open, at /proc/PID/fd."""
    count = 0
    for link in files.iterdir():
        with suppress(FileNotFoundError):  # closed in the meantime
            count += str(link.readlink()).startswith("socket:")
    return count


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["plain", "four answers", "grammar", "shared prefix"])
def test_random_disconnects_leak_nothing(start_server: StartServer, long_llama: Path, kind: str) -> None:
    """Closed politely or reset, before the headers, in the queue, in prefill, in the midst of the answer.

    500 plain ones and 100 of each other kind, 60 at a time; with PENSTOCK_LONG_TESTS=1 it is 2,000, 200 at a time.
    """
    count, at_once = (500 if kind == "plain" else 100), 60
    if os.environ.get("PENSTOCK_LONG_TESTS") == "1":
        count, at_once = 2000, 200
    flags = ["--max-batch-total-tokens", "65536", "--max-batch-size", "16", "--max-concurrent-requests", "1024"]
    server = start_server(long_llama, *flags)
    files = Path(f"/proc/{server.process.pid}/fd")
    rng = random.Random(11)
    texts = prompts(50)

    async def client(number: int) -> None:
        text = rng.choice(texts) * rng.choice([1, 1, 20])
        path, body = "/v1/chat/completions", endless(text, rng.choice([8, 2000]))
        body["stream"] = number % 3 != 0
        if kind == "four answers":
            body |= {"n": 4, "temperature": 1}
        elif kind == "grammar":
            body["guided_regex"] = "[a-z ]{1,500}" if number % 2 else f"[a-z ]{{1,{100 + number}}}"
        elif kind == "shared prefix":
            body["messages"][0]["content"] = "the quick brown fox jumps over " * 20 + text
        elif number % 4 == 1:
            path, body = "/generate_stream", {"inputs": text, "parameters": {"max_new_tokens": 400}}
        async with server.open(path, body) as (reader, writer):
            for _ in range(rng.choice([0, 0, 1, 3, 20])):
                try:
                    async with asyncio.timeout(0.2):
                        if not await reader.read(200):
                            break
                except (TimeoutError, ConnectionError):
                    break
            if number % 2:
                sock = writer.get_extra_info("socket")
                sock.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SO_LINGER: closing resets the connection

    async def storm() -> None:
        places = asyncio.Semaphore(at_once)

        async def one(number: int) -> None:
            async with places:
                await client(number)

        await asyncio.gather(*(one(n) for n in range(count)))

    server.post("/generate", {"inputs": "warm", "parameters": {"max_new_tokens": 1}})
    before = open_sockets(files)
    asyncio.run(storm())
    server.wait_idle(2)
    until = time.monotonic() + 5
    while open_sockets(files) > before + 1:  # the process that tries grammars out has one
        assert time.monotonic() < until, open_sockets(files)
        time.sleep(0.05)
    assert len(list(files.iterdir())) < before + 30  # pipes to the few processes that render templates
    free = server.metric('penstock_kv_blocks{state="free"}') + server.metric('penstock_kv_blocks{state="cached"}')
    assert free == server.metric("penstock_kv_blocks_capacity")
    assert server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).status == 200
    assert server.metric("penstock_engine_restarts_total") == 0
    for trouble in ("Traceback", "never retrieved", "ERROR", "destroyed"):
        assert trouble not in server.errors
