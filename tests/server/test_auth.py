"""Nobody gets in without the key, whatever the path, the method or the host name look like."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from tests.process import check_error, penstock

from .conftest import StartServer
from .running import Server

PROTECTED = [
    ("GET", "/"), ("POST", "/ping"), ("GET", "/info"), ("GET", "/metrics"), ("GET", "/v1/models"),
    ("POST", "/"), ("POST", "/generate"), ("POST", "/generate_stream"), ("POST", "/tokenize"),
    ("POST", "/v1/chat/completions"), ("GET", "/nothing"), ("PUT", "/generate"), ("DELETE", "/health"),
    ("POST", "/health"), ("OPTIONS", "/generate"), ("GET", "/health/"), ("GET", "//health"), ("GET",
    "/HEALTH"), ("GET", "/health/../generate"), ("GET", "/health;x"), ("GET", "/health%2f..%2fmetrics"),
    ("GET", "/%68ealth/"), ]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), PROTECTED)
def test_everything_but_health_needs_the_key(server: Server, method: str, path: str) -> None:
    answer = server.ask(method, path, "{}" if method == "POST" else None, Authorization="")
    assert answer.status == 401
    if path.startswith("/v1/"):
        assert answer.json()["error"]["type"] == "authentication_error"
    else:
        assert answer.body == b""


def test_health_is_open(server: Server) -> None:
    for path in ("/health", "/ping"):
        assert server.get(path, Authorization="").status == 200
    assert server.ask("HEAD", "/health", Authorization="").status == 200


def test_wrong_keys(server: Server) -> None:
    key = server.key
    assert key is not None
    for value in (
        key, f"Bearer {key[:-1]}", f"Bearer {key}x", f"Bearer {key.swapcase()}", "Bearer", "Bearer ", f"Basic {key}",
        f"Bearer{key}", "Bearer \xff", f"Bearer {key[: len(key) // 2]} {key[len(key) // 2 :]}",
    ):  # fmt: skip
        assert server.get("/info", Authorization=value).status == 401, value
    assert server.get("/info", Authorization=f"bearer {key}").status == 200


def test_the_key_is_checked_before_the_body(server: Server) -> None:
    assert server.post("/generate", "not json", Authorization="").status == 401


FOREIGN = ["evil.example", "evil.example:3000", "a/?", "localhost.evil.example", "", "evil@localhost",
           "localhost\r\nHost: evil.example"]  # fmt: skip
OWN = ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:3000", "10.1.2.3", "x.localhost"]


@pytest.mark.parametrize("host", FOREIGN)
def test_foreign_host_names_are_refused(server: Server, host: str) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as sock:
        sock.sendall(
            f"GET /info HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {server.key}\r\n"
            "Connection: close\r\n\r\n".encode()
        )
        assert sock.recv(4096).split()[1] in (b"403", b"400")


@pytest.mark.parametrize("host", OWN)
def test_own_names_and_addresses_are_fine(server: Server, host: str) -> None:
    assert server.get("/info", Host=host).status == 200


def test_the_key_file_is_private_and_goes_with_the_server(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama)
    file = Path(server.ready["key_file"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    assert file.is_relative_to(server.home)
    assert len(server.key or "") == 43
    assert (server.key or "?") not in server.errors
    for process in (server.process.pid, server.engine_pid()):
        for name in ("cmdline", "environ"):
            assert (server.key or "").encode() not in Path(f"/proc/{process}/{name}").read_bytes()
    server.interrupt()
    assert server.wait() == 0
    assert not file.exists()


def test_a_key_of_ones_own(start_server: StartServer, tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "my.key"
    file.write_text("first key of mine\nsecond\n")
    file.chmod(0o600)
    server = start_server(tiny_llama, "--api-key-file", str(file))
    assert server.ready["key_file"] == str(file)
    assert server.get("/info", Authorization="Bearer first key of mine").status == 200
    assert server.get("/info", Authorization="Bearer second").status == 200
    assert server.get("/info", Authorization="Bearer third").status == 401
    talk = {"messages": [{"role": "user", "content": "the lazy dog " * 20}], "max_tokens": 1}

    def cached(key: str) -> int:
        answer = server.post("/v1/chat/completions", talk, Authorization=f"Bearer {key}")
        count: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return count

    # One key's prompts are cached for that key only: nobody learns of another's by the time it takes.
    assert [cached("first key of mine"), cached("second")] == [0, 0]
    assert min(cached("first key of mine"), cached("second")) > 0
    server.interrupt()
    assert server.wait() == 0
    assert file.exists()


def test_key_files_that_will_not_do(tmp_path: Path, tiny_llama: Path) -> None:
    def refused(file: Path, *words: str) -> None:
        done = penstock("serve", tiny_llama, "--port", "0", "--api-key-file", file, home=tmp_path)
        check_error(done, 3, str(file), *words)

    open_file = tmp_path / "open.key"
    open_file.write_text("key\n")
    open_file.chmod(0o640)
    refused(open_file, "chmod 600")
    empty = tmp_path / "empty.key"
    empty.touch(0o600)
    refused(empty, "holds no key")
    refused(tmp_path / "nowhere.key", "No such file")


def test_a_planted_directory_is_not_used(tmp_path: Path, start_server: StartServer, tiny_llama: Path) -> None:
    """A link where the key's directory should be: another place is taken."""
    runtime = tmp_path / "run"
    runtime.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.symlink(elsewhere, runtime / "penstock")
    server = start_server(tiny_llama, XDG_RUNTIME_DIR=str(runtime))
    assert not list(elsewhere.iterdir())
    assert Path(server.ready["key_file"]).is_relative_to(tmp_path / ".config")


def test_without_auth_it_says_who_can_come_in(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama, "--no-auth", "--cors-allow-origin", "http://page.example")
    assert server.ready["key_file"] is None
    assert server.get("/info").status == 200
    assert "WARNING" in server.errors
    assert f"every user of {socket.gethostname()}" in server.errors
    # and here, with an origin allowed, pages of that origin may read the answers
    allowed = server.get("/info", Origin="http://page.example")
    assert allowed.headers["access-control-allow-origin"] == "http://page.example"
    assert "access-control-allow-origin" not in server.get("/info", Origin="http://other.example").headers
    preflight = server.ask("OPTIONS", "/generate", Origin="http://page.example")
    assert (preflight.status, preflight.headers["access-control-allow-methods"]) == (200, "GET,POST")


def test_cors_is_off_unless_asked_for(server: Server) -> None:
    assert "access-control-allow-origin" not in server.get("/info", Origin="http://page.example").headers


def test_a_server_for_the_network(start_server: StartServer, tiny_llama: Path) -> None:
    server = start_server(tiny_llama, "--hostname", "0.0.0.0", "--allow-host", "proxy.example")  # noqa: S104
    node = socket.gethostname()
    assert server.ready["url"] == f"http://{node}:{server.port}"
    for host, status in ((node, 200), (f"{node}:80", 200), ("proxy.example", 200), ("evil.example", 403)):
        assert server.get("/info", Host=host).status == status
    assert server.get("/info", Authorization="").status == 401
    assert f"ssh -N -L {server.port}:{node}:{server.port} {node}" in server.errors
