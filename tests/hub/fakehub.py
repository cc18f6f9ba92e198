"""A small hub on loopback that speaks enough of the real one's protocol for its own client library."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
PIECE = 20_000


class FakeHub:
    """Repositories by name; `requests` are the paths asked for. gated, hidden: names that are refused so."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.status = 0  # answer everything with this status
        self.cut: dict[str, int] = {}  # files whose first transfer ends after so many bytes
        self.stall = ""  # the file whose transfer stops halfway, for as long as the hub runs
        self.stalled, self.over = threading.Event(), threading.Event()
        self.wrong: dict[str, bytes] = {}  # files whose first transfer has this content instead
        self.ranges = True  # whether a transfer may begin in the middle
        self.pause = 0.0  # seconds between pieces of a transfer
        self.token = ""  # opens gated models
        self.sent: dict[str, int] = {}  # bytes sent of each file
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        """Serve on a free port."""
        hub = self

        class Handler(_Handler):
            house = hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.over.set()
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    house: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.house.requests.append(f"{self.command} {path}")
        if self.house.status:
            return self._send(self.house.status, {"error": "broken"})
        if path.startswith("/api/") and not path.startswith("/api/models/"):
            return self._send(404, {"error": "no such page"})
        if path.startswith("/api/models/"):
            org, name, *rest = path.removeprefix("/api/models/").split("/")
            return self._api(f"{org}/{name}", rest)
        org, name, kind, *rest = path.strip("/").split("/")
        assert kind == "resolve"
        return self._file(f"{org}/{name}", "/".join(rest[1:]), body)

    def _api(self, name: str, rest: list[str]) -> None:
        files = self.house.repos.get(name)
        if files is None:
            return self._send(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if rest and rest[0] == "revision" and rest[1] not in ("main", COMMIT):
            return self._send(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
        if rest and rest[0] == "tree":
            return self._send(200, [_tree_entry(n, d) for n, d in files.items()])
        siblings = [{"rfilename": n, "size": len(d)} for n, d in files.items()]
        return self._send(200, {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False})

    def _file(self, name: str, file: str, body: bool) -> None:
        if file not in self.house.repos.get(name, {}):
            code = "EntryNotFound" if name in self.house.repos else "RepoNotFound"
            return self._send(404, {"error": "not found"}, {"X-Error-Code": code})
        known = self.house.token and self.headers.get("Authorization") == f"Bearer {self.house.token}"
        if name in self.house.gated and not known:
            return self._send(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        data = self.house.repos[name][file]
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        start = start if self.house.ranges else 0
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        data = self.house.wrong.pop(file, data) if body else data
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.house.cut.pop(file, None) if body else None
        if body and file == self.house.stall:
            cut = len(data) // 2
        self._raw(206 if start else 200, data[start:], headers, body, cut, file)
        if body and file == self.house.stall:
            self.wfile.flush()
            self.house.stalled.set()
            self.house.over.wait(60)

    def _send(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._raw(status, json.dumps(value).encode(), headers or {}, self.command == "GET")

    def _raw(
        self, status: int, data: bytes, headers: dict[str, str], body: bool, cut: int | None = None, file: str = ""
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            for at in range(0, len(data[:cut]), PIECE):
                self.wfile.write(data[:cut][at : at + PIECE])
                self.house.sent[file] = self.house.sent.get(file, 0) + len(data[:cut][at : at + PIECE])
                time.sleep(self.house.pause)
        if cut is not None:
            self.close_connection = True


def _etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _tree_entry(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}  # noqa: S324
    if name.endswith(".safetensors"):
        entry["lfs"] = {"oid": _etag(data), "size": len(data), "pointerSize": 130}
    return entry
