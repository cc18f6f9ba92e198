"""One HTTP request to a server of ours, over TCP or a unix socket."""

from __future__ import annotations

import http.client
import socket
from dataclasses import dataclass


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens: a unix socket, or a host and a port."""

    host: str = "localhost"
    port: int = 0
    socket: str | None = None

    def __str__(self) -> str:
        return self.socket or f"{self.host}:{self.port}"


class _Connection(http.client.HTTPConnection):
    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        super().__init__(endpoint.host, endpoint.port or None, timeout=timeout)
        self._endpoint = endpoint

    def connect(self) -> None:
        if self._endpoint.socket is None:
            super().connect()
            return
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._endpoint.socket)


def get(endpoint: Endpoint, path: str, key: str | None = None, timeout: float = 5.0) -> tuple[int, bytes]:
    """Status and body of a GET. Raises OSError when nobody answers."""
    connection = _Connection(endpoint, timeout)
    try:
        connection.request("GET", path, headers={} if key is None else {"Authorization": f"Bearer {key}"})
        response = connection.getresponse()
        return response.status, response.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"{endpoint} does not speak HTTP") from error
    finally:
        connection.close()


def healthy(endpoint: Endpoint, timeout: float = 5.0) -> bool | None:
    """What /health says: True, False, or None when the server cannot be reached from here."""
    try:
        return get(endpoint, "/health", timeout=timeout)[0] == 200
    except OSError:
        return None
