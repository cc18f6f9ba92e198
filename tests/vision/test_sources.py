"""Where images come from: TGI's Markdown, and hosts that the server's operator has named."""

from __future__ import annotations

import http.server
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.errors import InvalidRequest
from penstock.vision import fetch as fetching
from penstock.vision.fetch import connect_public, fetch
from penstock.vision.sources import read_source, split_markdown

HOST = "images.example.org"


@pytest.mark.parametrize(
    ("text", "pieces", "addresses"),
    [
        ("plain", ["plain"], []),
        ("![](data:image/png;base64,AA==)", ["", ""], ["data:image/png;base64,AA=="]),
        ("a ![](https://h/x.png) b", ["a ", " b"], ["https://h/x.png"]),
        ("a ![a fox](https://h/x.png) b", ["a ![a fox](https://h/x.png) b"], []),
        ("a ![a fox](data:image/gif;base64,AA==) b", ["a ", " b"], ["data:image/gif;base64,AA=="]),
        ("![](data:a)![](data:b)", ["", "", ""], ["data:a", "data:b"]),
        ("![](x.png) ![ ]( ) [a](https://h)", ["![](x.png) ![ ]( ) [a](https://h)"], []),
        ("![" * 1000, ["![" * 1000], []),
    ],
)
def test_markdown(text: str, pieces: list[str], addresses: list[str]) -> None:
    assert split_markdown(text) == (pieces, addresses)


def test_markdown_of_a_text_model_is_text_where_it_is_an_address() -> None:
    assert split_markdown("a ![](https://h/x.png) b", only_data=True) == (["a ![](https://h/x.png) b"], [])


def test_markdown_is_found_in_time() -> None:
    began = time.process_time()
    for text in ("![" * 10**5, "![" + "a" * 10**6, "![](data:" + "a" * 10**6, "![](" * 10**5):
        split_markdown(text)
    assert time.process_time() - began < 10


class Site(http.server.BaseHTTPRequestHandler):
    """Answers by path."""

    def do_GET(self) -> None:
        if self.path == "/there":
            self._send(200, b"pixels")
        elif self.path == "/moved":
            self._send(302, b"", location="/there")
        elif self.path == "/round":
            self._send(302, b"", location="/round")
        elif self.path == "/away":
            self._send(302, b"", location="https://169.254.169.254/there")
        elif self.path == "/plain":
            self._send(302, b"", location=f"http://{HOST}/there")
        elif self.path == "/large":
            self._send(200, b"x" * 5000)
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
            except OSError:
                pass
        else:
            self._send(404, b"")

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """A server with a certificate for HOST: its port and the certificate."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-subj", f"/CN={HOST}",
         "-addext", f"subjectAltName=DNS:{HOST}"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1], folder / "cert.pem"
    server.shutdown()


def get(site: tuple[int, Path], path: str, most: int = 100) -> bytes:
    """Fetch from the site in the place of HOST."""
    port, certificate = site

    def connect(host: str, _: int, seconds: float) -> socket.socket:
        assert host == HOST
        context = ssl.create_default_context(cafile=str(certificate))
        return context.wrap_socket(socket.create_connection(("127.0.0.1", port), seconds), server_hostname=host)

    return fetch(f"https://{HOST}{path}", [HOST], most, connect)


def test_a_named_host_is_fetched_from(site: tuple[int, Path]) -> None:
    assert get(site, "/there") == b"pixels"
    assert get(site, "/moved") == b"pixels"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nowhere", "status 404"),
        ("/round", "moved more than 3 times"),
        ("/away", "does not fetch images from '169.254.169.254'"),
        ("/plain", "by https only"),
        ("/large", "more than 100 bytes"),
    ],
)
def test_what_a_host_may_not_do(site: tuple[int, Path], path: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        get(site, path)


def test_a_slow_host_is_not_waited_for(site: tuple[int, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "SECONDS", 0.5)
    with pytest.raises(InvalidRequest, match="cannot be fetched"):
        get(site, "/slow")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("https://evil.org/x", "does not fetch images from 'evil.org'"),
        (f"https://{HOST}.evil.org/x", "does not fetch images"),
        (f"https://{HOST}@evil.org/x", "does not fetch images from 'evil.org'"),
        (f"https://me:pw@{HOST}/x", "a port or a user"),
        (f"https://{HOST}:22/x", "a port or a user"),
        (f"https://{HOST}:x/", "malformed"),
        ("https://[::1/x", "malformed"),
        ("https:///x", "by https only"),
        ("ftp://images.example.org/x", "an image is a data URL"),
    ],
)
def test_other_addresses_are_refused(address: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        read_source(address, 100, [HOST])


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "10.0.0.1", "169.254.169.254", "::1"])
def test_private_addresses_are_never_connected_to(host: str) -> None:
    with pytest.raises(InvalidRequest, match="private address"):
        connect_public(host, 443, 1.0)
