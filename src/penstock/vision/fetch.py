"""Images from the web, where the server's operator has named the host: https, public addresses, bounded."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from urllib.parse import urljoin, urlsplit

from penstock.errors import InvalidRequest

SECONDS = 10.0  # for all of it
REDIRECTS = 3  # on the same host
_MOVED = (301, 302, 303, 307, 308)

Connect = Callable[[str, int, float], socket.socket]  # host, port, seconds -> an encrypted connection


def fetch(address: str, hosts: Collection[str], most: int, connect: Connect | None = None) -> bytes:
    """The bytes at an https address, `most` at most. Raises InvalidRequest with what and why.

    The name is looked up once and the connection goes to the very address that was judged public, so that a name
    service cannot change its mind in between. Proxies of the environment are not used.
    """
    until = time.monotonic() + SECONDS
    host = _host(address, hosts)
    for _ in range(REDIRECTS + 1):
        try:
            found = _get(address, host, most, until, connect or connect_public)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise InvalidRequest(f"the image at {host} cannot be fetched ({type(error).__name__})") from None
        if isinstance(found, bytes):
            return found
        address = urljoin(address, found)
        if _host(address, hosts) != host:
            raise InvalidRequest(f"the image at {host} has moved to another host, which is not followed")
    raise InvalidRequest(f"the image at {host} has moved more than {REDIRECTS} times")


def connect_public(host: str, port: int, seconds: float) -> socket.socket:
    """An encrypted connection to a host all of whose addresses are public. Raises InvalidRequest, OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not found or not all(ipaddress.ip_address(entry[4][0]).is_global for entry in found):
        raise InvalidRequest(f"the image's host {host} has a private address, which is not fetched from")
    plain = socket.create_connection((str(found[0][4][0]), port), seconds)
    try:
        return ssl.create_default_context().wrap_socket(plain, server_hostname=host)
    except BaseException:
        plain.close()
        raise


def _host(address: str, hosts: Collection[str]) -> str:
    """The host of an address that may be fetched from."""
    try:
        parts = urlsplit(address)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise InvalidRequest("an image's address is malformed") from None
    if parts.scheme.lower() != "https" or not host:
        raise InvalidRequest("an image is fetched by https only; send it as a data URL")
    if host not in hosts:
        raise InvalidRequest(
            f"this server does not fetch images from {host[:100]!r} (--allow-image-hosts); send it as a data URL"
        )
    if port not in (None, 443) or parts.username is not None:
        raise InvalidRequest("an image's address must not have a port or a user")
    return host


def _get(address: str, host: str, most: int, until: float, connect: Connect) -> bytes | str:
    """The body of a GET, or where it has moved to."""
    parts = urlsplit(address)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = http.client.HTTPSConnection(host)
    connection.sock = sock = connect(host, 443, _left(until))
    ending = threading.Timer(_left(until), _hang_up, (sock,))  # a byte now and then is no way around it
    ending.start()
    try:
        connection.request("GET", path, headers={"Accept": "image/*", "Connection": "close"})
        answer = connection.getresponse()
        if answer.status in _MOVED:
            return answer.getheader("location") or "/"
        if answer.status != 200:
            raise InvalidRequest(f"the image at {host} cannot be fetched (status {answer.status})")
        data = answer.read(most + 1)
        _left(until)
        if len(data) > most:
            raise InvalidRequest(f"the image at {host} has more than {most} bytes (--max-image-bytes)")
        return data
    finally:
        ending.cancel()
        connection.close()


def _hang_up(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left
