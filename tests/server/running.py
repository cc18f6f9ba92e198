"""A server process and a client for it, with nothing but the standard library."""

from __future__ import annotations

import asyncio
import http.client
import json
import select
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.process import command, environment

READY_SECONDS = 60


@dataclass
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()

    def events(self) -> list[Any]:
        """The JSON of the server-sent events; `[DONE]` as that string."""
        return events_of(self.body)


def events_of(raw: bytes) -> list[Any]:
    out: list[Any] = []
    for frame in raw.split(b"\n\n"):
        if frame.startswith(b"data: "):
            data = frame[6:]
            out.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return out


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=30)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(self._path)


@dataclass
class Server:
    """A running `penstock serve`."""

    process: subprocess.Popen[bytes]
    home: Path
    log: Path
    ready: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        url: str = self.ready["url"]
        return url

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 80

    @property
    def key(self) -> str | None:
        file = self.ready["key_file"]
        return None if file is None else Path(file).read_text().strip()

    @property
    def errors(self) -> str:
        """What it has said on stderr."""
        return self.log.read_text(errors="replace")

    def engine_pid(self) -> int:
        """The one child that has the model."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        engines = [pid for pid in children if b"penstock.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(engines) == 1, children
        return int(engines[0])

    def connection(self) -> http.client.HTTPConnection:
        if self.ready["uds"] is not None:
            return _UnixConnection(self.ready["uds"])
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def headers(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request. A str or bytes body goes out as it is, anything else as JSON. Header names use `_`."""
        sent = self.headers()
        if body is not None:
            sent["Content-Type"] = "application/json"
        for name, value in headers.items():
            sent[name.replace("_", "-")] = value
        sent = {name: value for name, value in sent.items() if value}
        raw = body if isinstance(body, bytes | str) or body is None else json.dumps(body)
        connection = self.connection()
        try:
            connection.request(method, path, raw, sent)
            response = connection.getresponse()
            content = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, content)
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Answer:
        return self.ask("GET", path, None, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask("POST", path, body, **headers)

    @contextmanager
    def stream(self, path: str, body: Any) -> Iterator[http.client.HTTPResponse]:
        """A streaming answer that is read as the test likes."""
        connection = self.connection()
        try:
            sent = {**self.headers(), "Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body), sent)
            yield connection.getresponse()
        finally:
            connection.close()

    @asynccontextmanager
    async def open(self, path: str, body: Any) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Send a POST on a connection of its own and leave the reading to the test."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + raw)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def post_async(self, path: str, body: Any) -> Answer:
        """A whole answer, beside others."""
        async with self.open(path, body) as (reader, _):
            raw = await reader.read()
        head, _, content = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines[1:])}
        if headers.get("transfer-encoding") == "chunked":
            content = _unchunked(content)
        return Answer(int(lines[0].split()[1]), headers, content)

    def metric(self, name: str) -> float:
        """The value of one series, written as in the exposition."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no series {name}")

    def wait_idle(self, seconds: float = 5) -> None:
        """Until nothing runs or waits and every block is back; fails when that takes longer."""
        end = time.monotonic() + seconds
        while True:
            busy = [
                self.metric("tgi_batch_current_size"),
                self.metric("tgi_queue_size"),
                self.metric('penstock_kv_blocks{state="used"}'),
                self.metric("penstock_requests_in_flight"),
            ]
            if not any(busy):
                return
            assert time.monotonic() < end, busy
            time.sleep(0.05)

    def wait_health(self, status: int, seconds: float) -> float:
        """Until /health answers so; returns the seconds it took."""
        began = time.monotonic()
        while self.get("/health").status != status:
            assert time.monotonic() - began < seconds, f"/health is not {status} after {seconds} s"
            time.sleep(0.02)
        return time.monotonic() - began

    def interrupt(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, seconds: float = 20) -> int:
        return self.process.wait(seconds)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


def _unchunked(raw: bytes) -> bytes:
    out = bytearray()
    while raw:
        size, _, raw = raw.partition(b"\r\n")
        length = int(size, 16)
        out += raw[:length]
        raw = raw[length + 2 :]
        if length == 0:
            break
    return bytes(out)


def launch(
    home: Path,
    model: Path | str,
    *flags: str,
    module: str = "penstock.cli.main",
    arguments: list[str] | None = None,
    **extra: str,
) -> Server:
    """Start a server and do not wait. arguments: in place of those that are usual in tests."""
    log = home / f"serve-{time.monotonic_ns()}.log"
    if arguments is None:
        arguments = ["serve", str(model), "--threads", "1", "--json"]
    if "--uds" not in flags and "--port" not in flags:
        arguments += ["--port", "0"]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command(*arguments, *flags, module=module),
            env=environment(home, **{"HF_HUB_OFFLINE": "1", "XDG_RUNTIME_DIR": "", **extra}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    return Server(process, home, log)


def start(home: Path, model: Path | str, *flags: str, **extra: str) -> Server:
    """Start a server and wait for its ready line."""
    server = launch(home, model, *flags, **extra)
    out = server.process.stdout
    assert out is not None
    if not select.select([out], [], [], READY_SECONDS)[0]:
        server.kill()
        raise AssertionError(f"not ready after {READY_SECONDS} s:\n{server.errors}")
    line = out.readline()
    if not line:
        server.kill()
        raise AssertionError(server.errors)
    server.ready = json.loads(line)
    return server
