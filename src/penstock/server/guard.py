"""Who gets in: the outermost layer.

Decides on the path, the method and the headers alone, before any body is read.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable

from penstock.server import journal, page
from penstock.server.config import ServeConfig
from penstock.server.exchange import Exchange, Header, Receive, Scope, Send
from penstock.server.key import Keys
from penstock.server.refusal import Refusal

App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Whether the server lives, and what it looks like to any client: no secrets. Everything else but the chat page
# (page.py) needs the key.
OPEN = dict.fromkeys(("/health", "/ping", "/docs", "/docs/", "/openapi.json", "/api-doc/openapi.json"), ("GET", "HEAD"))
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:\d{1,5})?")


class Guard:
    """Checks the Host header against DNS rebinding and the key against everybody else.

    A browser page can make its visitor's browser call a server on loopback under a name that its author
    controls; the Host header then holds that name. Literal addresses and our own names are fine: `names`.
    """

    def __init__(self, app: App, config: ServeConfig, keys: Keys | None) -> None:
        self._app, self._keys = app, keys
        self._check_host = config.uds is None  # no browser reaches a unix socket
        names = {"localhost", config.host.lower(), *(name.lower() for name in config.allow_hosts)}
        if not is_loopback(config.host):
            names.add(socket.gethostname().lower())
        self.names = names
        self._origins = config.cors_allow_origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send)
        hosts = [value for name, value in exchange.headers if name == b"host"]  # none is HTTP/1.0; browsers send one
        if self._check_host and not all(map(self._host_allowed, hosts)):
            with journal.entry(exchange):
                await exchange.refuse(Refusal(403, "This server is not known under that host name", "forbidden"))
            return
        origin = self._cors(exchange)
        if origin and exchange.method == "OPTIONS":
            allow = [
                (b"access-control-allow-methods", b"GET,POST"),
                (b"access-control-allow-headers", b"content-type,authorization,x-api-key"),
            ]
            await exchange.answer(200, b"", headers=[*origin, *allow])
            return
        needs_key = exchange.method not in OPEN.get(exchange.path, ()) and not page.wanted(exchange)
        if self._keys is not None and needs_key:
            holder = self._keys.holder(exchange.header(b"authorization"), exchange.header(b"x-api-key"))
            if holder is None:
                with journal.entry(exchange):
                    await self._unauthorized(exchange)
                return
            scope["penstock.salt"], scope["penstock.key_name"] = holder.salt, holder.name
        scope["penstock.headers"] = origin
        await self._app(scope, receive, send)

    def _host_allowed(self, header: bytes) -> bool:
        match = _HOST.fullmatch(header.decode("latin-1").lower())
        if match is None:
            return False
        name = match["name"]
        if name in self.names or name.strip("[]") in self.names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True

    def _cors(self, exchange: Exchange) -> list[Header]:
        """The header that lets a page of an allowed origin read the answer."""
        origin = exchange.header(b"origin")
        if origin is None or not self._origins:
            return []
        if "*" in self._origins:
            return [(b"access-control-allow-origin", b"*")]
        if origin.decode("latin-1") in self._origins:
            return [(b"access-control-allow-origin", origin), (b"vary", b"origin")]
        return []

    @staticmethod
    async def _unauthorized(exchange: Exchange) -> None:
        challenge = [(b"www-authenticate", b"Bearer")]
        if exchange.openai:
            text = "The key is missing or wrong: send it as `Authorization: Bearer KEY`"
            content_type, body = Refusal(401, text, "invalid_api_key").body(exchange.family)
            await exchange.answer(401, body, content_type, challenge)
        else:
            await exchange.answer(401, b"", headers=challenge)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
