"""The chat page at `/`, for browsers; every other client gets TGI's health there."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files

from penstock.server.exchange import Exchange

_INLINE = re.compile(rb"<(style|script)>(.*?)</\1>", re.DOTALL)


def wanted(exchange: Exchange) -> bool:
    """Whether a browser opens the page: it names text/html, which programs that want TGI's health do not.

    The guard lets exactly these requests in without the key: a browser cannot send one when it opens an
    address, and the page holds nothing that is secret. Everything the page asks for needs the key.
    """
    if exchange.path != "/" or exchange.method not in ("GET", "HEAD"):
        return False
    accept = (exchange.header(b"accept") or b"").lower()
    return b"text/html" in accept and b"application/json" not in accept


class Page:
    """The route. `other` answers who did not ask for a page."""

    def __init__(self, other: Callable[[Exchange], Awaitable[None]]) -> None:
        self._other = other
        self._html = (files("penstock.server") / "chat.html").read_bytes()
        self._headers = [
            (b"content-security-policy", policy(self._html)),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-cache"),
            (b"vary", b"accept"),
        ]

    async def get(self, exchange: Exchange) -> None:
        """The page for browsers, health for others."""
        if wanted(exchange):
            await exchange.answer(200, self._html, b"text/html; charset=utf-8", self._headers)
        else:
            await self._other(exchange)


def policy(html: bytes) -> bytes:
    """A Content-Security-Policy under which the page runs its own script and style and nothing else.

    Scripts and styles are known by their hash, requests go to this server only, no other site can frame the
    page, and a string can not become markup (trusted types).
    """
    known: dict[bytes, list[bytes]] = {b"style": [], b"script": []}
    for kind, text in _INLINE.findall(html):
        known[kind].append(b"'sha256-%b'" % base64.b64encode(hashlib.sha256(text).digest()))
    rules = (
        b"default-src 'none'",
        b"script-src " + b" ".join(known[b"script"]),
        b"style-src " + b" ".join(known[b"style"]),
        b"connect-src 'self'",
        b"img-src data:",
        b"base-uri 'none'",
        b"form-action 'none'",
        b"frame-ancestors 'none'",
        b"require-trusted-types-for 'script'",
        b"trusted-types 'none'",
    )
    return b"; ".join(rules)
