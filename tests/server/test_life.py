"""The ends of a server's life: drains, second signals, an engine that dies; and rest while nothing happens."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import StartServer
from .running import Server, events_of
from .test_load import endless


def read_all(server: Server, body: dict[str, Any], out: list[Any], started: threading.Event) -> None:
    with server.stream("/v1/chat/completions", body) as response:
        first = response.read1(65536)
        started.set()
        out.extend(events_of(first + response.read()))


def follow(server: Server, body: dict[str, Any]) -> tuple[threading.Thread, list[Any]]:
    """Read a stream beside the test; returns once its first bytes are there."""
    events: list[Any] = []
    started = threading.Event()
    thread = threading.Thread(target=read_all, args=(server, body, events, started))
    thread.start()
    assert started.wait(20)
    return thread, events


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_drain_lets_the_running_finish(start_server: StartServer, long_llama: Path, number: int) -> None:
    server = start_server(long_llama)
    thread, events = follow(server, endless(tokens=1500))
    server.interrupt(number)
    assert server.wait_health(503, 1) < 0.5
    refused = server.post("/generate", {"inputs": "a"})
    assert refused.status == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert server.process.poll() is None
    thread.join(30)
    assert events[-1] == "[DONE]"
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert server.wait(5) == 0
    assert "Traceback" not in server.errors


def test_a_drain_has_its_end(start_server: StartServer, long_llama: Path) -> None:
    server = start_server(long_llama, "--drain-seconds", "0.5")
    with server.stream("/v1/chat/completions", endless()) as response:
        response.read1(100)
        began = time.monotonic()
        server.interrupt()
        assert server.wait(10) == 0
        assert 0.4 < time.monotonic() - began < 5


def test_a_second_signal_ends_at_once(start_server: StartServer, long_llama: Path) -> None:
    server = start_server(long_llama)
    engine = server.engine_pid()
    key = Path(server.ready["key_file"])
    with server.stream("/v1/chat/completions", endless()) as response:
        response.read1(100)
        server.interrupt()
        server.wait_health(503, 1)
        began = time.monotonic()
        server.interrupt()
        assert server.wait(5) == 130
        assert time.monotonic() - began < 2
    assert not key.exists()
    assert gone(engine)


def gone(pid: int, seconds: float = 5) -> bool:
    """Whether a process ends within that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_a_dead_engine_is_told_at_once_and_replaced(start_server: StartServer, long_llama: Path) -> None:
    server = start_server(long_llama)
    engine = server.engine_pid()
    streams = [follow(server, endless(f"fox {n}")) for n in range(4)]
    native = follow_native(server)
    whole: list[int] = []
    body = {**endless(), "stream": False}
    waiting = threading.Thread(target=lambda: whole.append(server.post("/v1/chat/completions", body).status))
    waiting.start()
    while server.metric("tgi_batch_current_size") < 6:
        time.sleep(0.01)
    os.kill(engine, signal.SIGKILL)
    began = time.monotonic()
    assert server.wait_health(503, 1) < 1
    for thread, _ in (*streams, native, (waiting, None)):
        thread.join(2)
        assert not thread.is_alive()
    assert time.monotonic() - began < 2
    for _, events in streams:
        assert events[-1] == "[DONE]"
        assert events[-2]["error"]["code"] == "generation"
        assert events[-2]["error"]["http_status_code"] == 424
    assert native[1][-1]["error_type"] == "generation"
    assert native[1][-1]["error"].startswith("Request failed during generation: ")
    assert whole == [424]
    server.wait_health(200, 20)
    assert server.engine_pid() != engine
    assert server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 2}}).status == 200
    assert server.metric("penstock_engine_restarts_total") == 1
    server.wait_idle()


def follow_native(server: Server) -> tuple[threading.Thread, list[Any]]:
    events: list[Any] = []
    started = threading.Event()

    def read() -> None:
        # Streams of the native API end with EOS, so this one may need more than one prompt.
        body = {"inputs": "the fox", "parameters": {"max_new_tokens": 60_000}}
        with server.stream("/generate_stream", body) as response:
            raw = response.read1(65536)
            started.set()
            events.extend(events_of(raw + response.read()))

    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(20)
    return thread, events


def test_requests_while_the_engine_is_down_get_503(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama)
    os.kill(server.engine_pid(), signal.SIGKILL)
    server.wait_health(503, 1)
    answer = server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}})
    assert answer.status == 503
    assert answer.json() == {"error": "unhealthy", "error_type": "healthcheck"}
    assert int(answer.headers["retry-after"]) >= 1
    server.wait_health(200, 20)


def test_an_engine_that_keeps_dying_ends_the_server(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama)
    for _ in range(4):
        engine = server.engine_pid()
        os.kill(engine, signal.SIGKILL)
        while server.process.poll() is None:
            try:
                if server.get("/health").status == 200 and server.engine_pid() != engine:
                    break
            except (OSError, http.client.HTTPException, AssertionError):
                pass
            time.sleep(0.02)
    assert server.wait(10) == 1
    assert "Error: the engine died 4 times" in server.errors
    assert "Traceback" not in server.errors


def test_the_engine_goes_with_its_server(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama)
    engine = server.engine_pid()
    server.process.kill()
    assert gone(engine)


def test_idle_costs_nothing(server: Server) -> None:
    server.wait_idle()

    def ticks() -> int:
        total = 0
        for pid in (server.process.pid, server.engine_pid()):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
        return total

    before = ticks()
    time.sleep(3)
    assert ticks() - before <= 3  # hundredths of a second in three seconds: one per cent


def test_a_silent_stream_gets_comments() -> None:
    """Over real HTTP, with a silence short enough for a test."""
    from penstock.server.exchange import Exchange, Receive, Scope, Send
    from penstock.server.protocol import HttpServer

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        await exchange.start_events([])
        with exchange.kept_alive(0.05):
            await asyncio.sleep(0.3)
            await exchange.event({"index": 1})
        await exchange.end()

    async def scenario() -> bytes:
        import socket

        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen()
            server = HttpServer(slow)
            task = asyncio.create_task(server.run_on(sock))
            reader, writer = await asyncio.open_connection(*sock.getsockname())
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            raw = await reader.read()
            writer.close()
            server.leave.set()
            await task
            return raw

    raw = asyncio.run(scenario())
    assert 3 <= raw.count(b"\r\n:\n\n\r\n") <= 6
    assert b'data: {"index":1}\n\n' in raw
