"""A conversation with a model on a server, over HTTP or a unix socket, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from penstock.cli.conversation import Finish, Message, drop_oldest
from penstock.cli.server_key import key_of_port, key_of_socket, read_key
from penstock.errors import EnvironmentFault, InvalidRequest, ModelError, PenstockError, UsageError

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 120.0  # a living server writes a comment every 15 s
MAX_LINE = 4 * 1024 * 1024  # bytes of one event
MAX_BODY = 16 * 1024 * 1024
TOO_LONG = (400, 413, 422)


class Server:
    """Where a server listens, and the key for it."""

    def __init__(self, url: str | None, uds: str | None, key_file: str | None) -> None:
        """url: http://, https:// or http+unix://%2Fpath%2Fsocket; uds: the path of a unix socket.

        key_file: the file with the key; None finds the key of a server of this user on this machine.
        """
        self._uds, self._base = uds, ""
        self._host, self._port, self._secure = "localhost", 80, False
        self.shown = uds or url or ""
        if uds is None:
            self._parse(url or "")
        if key_file is not None:
            self._key: str | None = read_key(Path(key_file))
        elif self._uds is not None:
            self._key = key_of_socket(self._uds)
        else:
            self._key = key_of_port(self._host, self._port)

    def _parse(self, url: str) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        try:
            if parts.scheme == "http+unix" and parts.netloc:
                self._uds = unquote(parts.netloc)
            elif parts.scheme in ("http", "https") and parts.hostname:
                self._host, self._secure = parts.hostname, parts.scheme == "https"
                self._port = parts.port or (443 if self._secure else 80)
            else:
                raise ValueError("scheme")
        except ValueError:
            raise UsageError(
                f"{url!r} is not the URL of a server.", "", "For example: --url http://127.0.0.1:3000"
            ) from None
        self._base = parts.path.rstrip("/").removesuffix("/v1")

    def send(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """The response to one request. Raises EnvironmentFault when nobody answers, or the key is wrong."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        connection = self._connection()
        try:
            connection.connect()
            if connection.sock is not None:
                connection.sock.settimeout(SILENCE_SECONDS)
            connection.request(method, self._base + path, data, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise EnvironmentFault(
                f"No server answers at {self.shown}.",
                f"{_words(error)}.",
                "Is it running? `penstock serve MODEL` prints its URL; a tunnel needs its ssh to be up.",
            ) from None
        if response.status in (401, 403):
            raise EnvironmentFault(
                f"The server at {self.shown} refuses the key (status {response.status}).",
                "No key was found." if not self._key else "The key is not this server's.",
                "Give the key file that the server printed: --api-key-file FILE",
            )
        return response

    def _connection(self) -> http.client.HTTPConnection:
        if self._uds is not None:
            return _UnixConnection(self._uds)
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=CONNECT_SECONDS)

    def models(self) -> list[str]:
        """The names that the server serves."""
        response = self.send("GET", "/v1/models")
        answer = _body(response)
        if response.status != 200:
            raise EnvironmentFault(f"The server at {self.shown} does not list its models.", message_of(answer))
        found = answer.get("data") if isinstance(answer, dict) else None
        return [str(m.get("id")) for m in found if isinstance(m, dict)] if isinstance(found, list) else []


class RemoteChat:
    """Answers from a server's /v1/chat/completions."""

    plain = False

    def __init__(self, server: Server, model: str, asked: dict[str, Any]) -> None:
        """asked: temperature, top_p, seed and max_new_tokens, None where the server is to choose."""
        self.model, self._server = model, server
        names = {"max_new_tokens": "max_tokens"}
        self._asked = {names.get(name, name): value for name, value in asked.items() if value is not None}

    def reply(self, messages: list[Message], finish: Finish) -> Iterator[str]:
        """The pieces of the answer; drops the oldest turns when the server says that they are too many."""
        body = {
            "model": self.model,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._asked,
        }
        while True:
            response = self._server.send("POST", "/v1/chat/completions", {**body, "messages": messages})
            if response.status == 200:
                break
            text = message_of(_body(response))
            if not (response.status in TOO_LONG and "tokens" in text and drop_oldest(messages)):
                raise refused(response.status, text)
        try:
            yield from self._read(response, finish)
        finally:
            response.close()  # after Ctrl-C too: the server stops when its client is gone

    def _read(self, response: http.client.HTTPResponse, finish: Finish) -> Iterator[str]:
        for event in events(response):
            if "error" in event:
                raise PenstockError("The server broke off the answer.", message_of(event))
            usage = event.get("usage")
            if isinstance(usage, dict):
                finish.prompt_tokens = int(usage.get("prompt_tokens", 0))
                finish.generated_tokens = int(usage.get("completion_tokens", 0))
            for choice in event.get("choices") or []:
                finish.reason = choice.get("finish_reason") or finish.reason
                yield choice.get("delta", {}).get("content") or ""
        if not finish.reason:
            raise PenstockError("The server ended the answer in the middle.", "", "Look at its log.")


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=CONNECT_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_SECONDS)
        self.sock.connect(self._path)


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON events of an SSE stream up to [DONE]; comments and other fields are skipped."""
    try:
        while True:
            line = response.readline(MAX_LINE + 1)
            if not line or len(line) > MAX_LINE:
                return
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if isinstance(event, dict):
                yield event
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise PenstockError("The connection to the server broke.", f"{_words(error)}.") from None


def refused(status: int, text: str) -> PenstockError:
    """The error for an answer that is not 200."""
    if status == 429 or status >= 500:
        return EnvironmentFault(f"The server answers {status}.", text, "Try again in a moment.")
    if status == 404:
        return ModelError("The server does not have this model.", text, "Leave the model's name out.")
    return InvalidRequest(f"The server refuses the request ({status}): {text}")


def message_of(answer: Any) -> str:
    """The text in an error body, OpenAI's shape or TGI's."""
    error = answer.get("error", answer.get("message")) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        error = error.get("message")
    return str(error)[:500]


def _body(response: http.client.HTTPResponse) -> Any:
    raw = response.read(MAX_BODY)
    try:
        return json.loads(raw)
    except ValueError:
        return raw[:200].decode("utf-8", "replace")


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
