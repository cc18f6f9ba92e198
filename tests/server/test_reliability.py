"""The server against strangers, slow clients, kills and leaks. Waits are shortened; the factor is said in each test."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from .conftest import StartServer
from .running import Server, start
from .test_life import follow, gone
from .test_load import endless
from .test_matrix import resident

LONG = os.environ.get("PENSTOCK_LONG_TESTS") == "1"
ROUTES = [
    "/", "/generate", "/generate_stream", "/tokenize", "/chat_tokenize", "/invocations", "/vertex", "/info", "/metrics",
    "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/detokenize",
]  # fmt: skip
OPEN = ("/health", "/ping", "/docs", "/docs/", "/openapi.json", "/api-doc/openapi.json")
SHM = Path("/dev/shm")  # noqa: S108 (looked into, never written to)


def mutant(rng: random.Random, route: str) -> tuple[str, str, str]:
    """(method, target, extra header) near a protected route, or near an open one."""
    path = rng.choice([route, route.upper(), f"/health/..{route}", f"/docs/{route}", f"{route}/", f"/{route}"])
    for _ in range(rng.randint(0, 3)):
        at = rng.randint(0, len(path))
        path = (
            path[:at] + rng.choice(["/", "//", "%2e", "%2f", ";x", "?", "#", "%00", "..", "%25", "\\", "x"]) + path[at:]
        )
    path = path if path.startswith("/") else f"/{path}"
    if rng.random() < 0.1:
        path = f"http://localhost{path}"
    header = rng.choice([
        "Host: localhost", "Host: a/?", "Host: evil.example", "Host: localhost\r\nX_Api_Key: x",
        "Host: localhost\r\nX-Original-URL: /health", "Host: localhost\r\nAuthorization: Bearer",
        "Host: localhost\r\nX-Forwarded-For: 127.0.0.1", "Host: localhost\r\nAccept: text/html",
    ])  # fmt: skip
    return rng.choice(["GET", "POST", "HEAD", "PUT", "OPTIONS", "DELETE", "get"]), path, header


def test_no_mutant_of_a_route_gets_in_without_the_key(server: Server) -> None:
    """A1; 1,000 mutants a route. Open ones are those that resolve to an open path."""
    rng = random.Random(1)
    before = server.metric("tgi_request_count")
    for route in ROUTES:
        for _ in range(1000):
            method, target, header = mutant(rng, route)
            with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
                sock.sendall(
                    f"{method} {target} HTTP/1.1\r\n{header}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()
                )
                answer = sock.recv(65536)
            status = answer.split(maxsplit=2)[1] if answer else b"closed"
            if status in (b"200", b"303"):  # the chat page for a browser, or an open document
                name = target.split("?")[0].split("#")[0].replace("http://localhost", "")
                page = name == "/" and "text/html" in header
                assert method in ("GET", "HEAD"), (method, target, header, answer[:300])
                assert page or name in OPEN, (method, target, header)
                continue
            assert status in (b"400", b"401", b"403", b"404", b"405", b"closed"), (method, target, header, answer[:300])
    assert server.metric("tgi_request_count") == before


def test_no_secret_is_left_anywhere(start_server: StartServer, tiny_llama: Path) -> None:
    """A3: argv, environment, log, error bodies, metrics and files, after requests of all kinds and a crash."""
    token = "hf_" + "S" * 30
    server = start_server(tiny_llama, HF_TOKEN=token)
    key = server.key or ""
    bodies = b""
    for path in ("/generate", "/v1/chat/completions", "/nothing", "/tokenize"):
        for body in ("{}", "nonsense", '{"inputs":"fox","parameters":{"max_new_tokens":1}}'):
            bodies += server.post(path, body).body
            bodies += server.post(path, body, Authorization=f"Bearer {key}x").body
    os.kill(server.engine_pid(), signal.SIGKILL)
    server.wait_health(503, 2)
    server.wait_health(200, 20)
    bodies += server.get("/metrics").body + server.get("/info").body + server.errors.encode()
    engine = Path(f"/proc/{server.engine_pid()}")
    bodies += (engine / "environ").read_bytes() + (engine / "cmdline").read_bytes()
    bodies += Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    for file in server.home.rglob("*"):
        if file.is_file() and str(file) != server.ready["key_file"] and file.suffix != ".safetensors":
            bodies += file.read_bytes()
    assert key.encode() not in bodies + Path(f"/proc/{server.process.pid}/environ").read_bytes()
    assert token.encode() not in bodies


STRANGER = """
import os, socket, sys
port, uds, key_file, pid = sys.argv[1:]
found = []
for path in (key_file, f"/proc/{pid}/environ", f"/proc/{pid}/mem"):
    try:
        open(path, "rb").read(1); found.append(path)
    except OSError: pass
try:
    os.listdir(f"/proc/{pid}/fd"); found.append("fd")
except OSError: pass
try:
    socket.socket(socket.AF_UNIX).connect(uds); found.append("uds")
except OSError: pass
for name in os.listdir("/dev/shm"):
    try:
        open("/dev/shm/" + name, "rb"); found.append(name) if os.stat("/dev/shm/" + name).st_uid == 0 else None
    except OSError: pass
with socket.create_connection(("127.0.0.1", int(port))) as s:
    s.sendall(b"GET /info HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    if b" 401 " not in s.recv(4096): found.append("http")
print(found)
"""


def test_another_user_gets_nothing(tiny_llama: Path) -> None:
    """A4: what a second user of the machine can reach."""
    if os.getuid() != 0:
        pytest.skip("becoming another user needs root")
    shared = set(SHM.iterdir())
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        home.chmod(0o755)  # no help from the directory that the tests live in
        servers = [start(home, tiny_llama), start(home, tiny_llama, "--uds", str(home / "run" / "socket"))]
        try:
            assert set(SHM.iterdir()) == shared
            arguments = [servers[0].port, servers[1].ready["uds"], servers[0].ready["key_file"], servers[0].process.pid]
            done = subprocess.run(
                ["/usr/bin/env", "python3", "-c", STRANGER, *map(str, arguments)],
                user=65534, group=65534, extra_groups=[], capture_output=True, text=True, timeout=30, check=False,
                env={"PATH": os.environ["PATH"].replace(str(Path(sys.executable).parent), "/usr/bin")},
            )  # fmt: skip
            assert done.stdout == "[]\n", done.stdout + done.stderr
        finally:
            for server in servers:
                server.kill()


def listening(pid: int) -> set[str]:
    """Addresses that a process and its children listen on, as in /proc/net: hexadecimal address and port."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    inodes: set[str] = set()
    for process in (str(pid), *children):
        for descriptor in Path(f"/proc/{process}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return {row[1] for row in rows if row[3] == "0A" and row[9] in inodes}


def test_it_listens_where_it_says_and_nowhere_else(start_server: StartServer, tiny_llama: Path, tmp_path: Path) -> None:
    """A5; after requests of kinds that start processes of their own."""
    server = start_server(tiny_llama)
    for form in ({"type": "json_object"}, {"type": "text"}):
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1, "response_format": form}
        assert server.post("/v1/chat/completions", body).status == 200
    assert listening(server.process.pid) == {f"0100007F:{server.port:04X}"}
    assert listening(start_server(tiny_llama, "--uds", str(tmp_path / "run" / "socket")).process.pid) == set()


def test_slow_clients_are_cut(start_server: StartServer, long_llama: Path) -> None:
    """D3, ten times shortened: heads within 1 s, silent bodies after 1 s, unread streams after 2 s; 100, 40 and 8."""
    server = start_server(long_llama, "--header-seconds", "1", "--body-seconds", "1", "--unread-seconds", "2",
                          "--max-batch-total-tokens", "131072")  # fmt: skip
    start_of_request = f"POST /generate HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.key}\r\n".encode()

    async def slow_head() -> tuple[bytes, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        began = time.monotonic()
        answer = asyncio.create_task(reader.read(100))
        for letter in start_of_request:
            if answer.done():
                break
            writer.write(bytes([letter]))
            await asyncio.sleep(0.2)
        writer.close()
        return await answer, time.monotonic() - began

    async def slow_body() -> tuple[bytes, float]:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(start_of_request + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        began = time.monotonic()
        answer = await reader.read(100)
        writer.close()
        return answer, time.monotonic() - began

    async def all_of() -> list[tuple[bytes, float]]:
        return await asyncio.gather(*(slow_head() for _ in range(100)), *(slow_body() for _ in range(40)))

    before = resident(server.process.pid)
    for answer, seconds in asyncio.run(all_of()):
        assert answer.startswith(b"HTTP/1.1 408")
        assert 0.8 < seconds < 5

    raw = json.dumps({**endless(), "logprobs": True, "top_logprobs": 5}).encode()
    head = start_of_request.replace(b"/generate", b"/v1/chat/completions") + b"Content-Type: application/json\r\n"
    deaf = [socket.socket() for _ in range(8)]
    try:
        for sock in deaf:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", server.port))
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
        while server.metric("tgi_batch_current_size") < 8:
            time.sleep(0.02)
        began = time.monotonic()
        assert server.post("/generate", {"inputs": "a", "parameters": {"max_new_tokens": 1}}).status == 200
        assert time.monotonic() - began < 3
        server.wait_idle(60)
    finally:
        for sock in deaf:
            sock.close()
    assert server.metric('tgi_request_failure{err="dropped"}') == 8
    assert resident(server.process.pid) - before < 100 * 2**20
    assert "Traceback" not in server.errors


@pytest.mark.timeout(3600 if LONG else 120)
@pytest.mark.parametrize("again", range(34 if LONG else 1))
def test_three_kills_of_the_engine_under_32_streams(start_server: StartServer, long_llama: Path, again: int) -> None:
    """K1 with three kills a server, for a fourth within five minutes ends it (test_life.py); 102 in the long run.

    It serves again within 5 s more than it took to start, which on a busy machine is long, or within 10 s.
    """
    rng = random.Random(again)
    began = time.monotonic()
    server = start_server(long_llama, "--max-batch-total-tokens", "131072", "--max-total-tokens", "65536")
    load_seconds = time.monotonic() - began
    for kill in range(1, 4):
        engine = server.engine_pid()
        streams = [follow(server, endless(f"fox {n}")) for n in range(32)]
        time.sleep(rng.uniform(0, 0.2))
        os.kill(engine, signal.SIGKILL)
        began = time.monotonic()
        assert server.wait_health(503, 1) < 1
        for thread, _ in streams:
            thread.join(5)
            assert not thread.is_alive()
        assert time.monotonic() - began < 2
        assert all(events[-1] == "[DONE]" and "error" in events[-2] for _, events in streams)
        server.wait_health(200, max(load_seconds + 5, 10) - (time.monotonic() - began))
        assert server.metric("penstock_engine_restarts_total") == kill
    server.wait_idle()


@pytest.mark.parametrize("again", range(50 if LONG else 1))
def test_a_drain_of_64_streams(start_server: StartServer, long_llama: Path, again: int) -> None:
    """K4, 50 times in the long run."""
    server = start_server(long_llama, "--max-batch-total-tokens", "65536")
    streams = [follow(server, endless(f"fox {n}", tokens=400)) for n in range(64)]  # a second at least
    time.sleep(random.Random(again).uniform(0, 0.1))
    server.interrupt()
    assert server.wait_health(503, 1) < 0.2
    refused = server.post("/generate", {"inputs": "a"})
    assert (refused.status, int(refused.headers["retry-after"]) >= 1) == (503, True)
    for thread, events in streams:
        thread.join(25)
        assert events[-1] == "[DONE]"
        assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert server.wait(10) == 0


def test_a_killed_server_leaves_nothing(start_server: StartServer, tiny_llama: Path) -> None:
    """K2: the engine goes with the API process, and the port is free again; 50 times in the long run."""
    for _ in range(50 if LONG else 3):
        server = start_server(tiny_llama)
        engine = server.engine_pid()
        server.process.kill()
        server.process.wait()
        assert gone(engine)
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", server.port))


def test_a_stopped_engine_is_noticed_and_comes_back(start_server: StartServer, tiny_llama: Path) -> None:
    """K3; the engine is stopped for as long as it takes to notice, in the long run for 90 s."""
    server = start_server(tiny_llama)
    engine = server.engine_pid()
    os.kill(engine, signal.SIGSTOP)
    try:
        assert server.wait_health(503, 11) < 10
        assert server.post("/generate", {"inputs": "a"}).status == 503
        time.sleep(80 if LONG else 0)
    finally:
        os.kill(engine, signal.SIGCONT)
    assert server.wait_health(200, 5) < 4
    assert server.engine_pid() == engine
    assert "the engine process has said nothing for" in server.errors
    assert "most recent call first" in server.errors  # where its threads were
    assert "in main" in server.errors
    server.wait_idle()


LEAK = """
import sys
if "penstock.engine.process" in sys.orig_argv:
    from penstock.engine.block_pool import BlockPool
    release = BlockPool.release
    BlockPool.release = lambda self, blocks: release(self, blocks[1:])
"""


def test_a_leak_would_be_found(tmp_path: Path, tiny_llama: Path) -> None:
    """The negative control: an engine that keeps a block of every request does not pass `wait_idle`."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(LEAK)
    root = Path(__file__).parent.parent.parent
    server = start(tmp_path, tiny_llama, PYTHONPATH=f"{site}:{root / 'src'}")
    try:
        body = {"inputs": "the quick brown fox " * 4, "parameters": {"max_new_tokens": 2}}
        assert server.post("/generate", body).status == 200
        with pytest.raises(AssertionError):
            server.wait_idle(1)
    finally:
        server.kill()
