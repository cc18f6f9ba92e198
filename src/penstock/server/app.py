"""The routes, and what happens around each of them."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from penstock.server import journal
from penstock.server.anthropic.messages import Messages
from penstock.server.exchange import ClientLeft, Exchange, Receive, Scope, Send
from penstock.server.house import House
from penstock.server.native.cloud import Cloud
from penstock.server.native.generate import Native
from penstock.server.openai.adapters import AdapterRoutes
from penstock.server.openai.batches import PREFIXES as BATCH_PREFIXES
from penstock.server.openai.batches import Batches
from penstock.server.openai.chat import Chat
from penstock.server.openai.completions import Completions
from penstock.server.openai.embeddings import Embeddings
from penstock.server.openai.models import PREFIX as MODEL_PREFIX
from penstock.server.openai.models import Models
from penstock.server.openai.responses import Responses
from penstock.server.openai.tokens import TokenRoutes
from penstock.server.openapi import Documents
from penstock.server.page import Page
from penstock.server.refusal import Refusal, draining, internal
from penstock.server.status import Status

log = logging.getLogger("penstock.server")

Getter = Callable[[Exchange], Awaitable[None]]
Poster = Callable[[Exchange, bytes], Awaitable[None]]

_LABELS = {429: "overloaded", 422: "validation"}  # TGI's labels of failures


class App:
    """Finds the route, reads the body, and turns every failure into an answer."""

    def __init__(self, house: House) -> None:
        self._house = house
        native, chat, status, models = Native(house), Chat(house), Status(house), Models(house)
        completions, embeddings = Completions(house), Embeddings(house)
        tokens, messages = TokenRoutes(house, native.tokenize), Messages(house)
        adapters = AdapterRoutes(house)
        cloud, documents = Cloud(native, chat.completions, completions.completions), Documents()
        self._model = models.one
        self.batches = Batches(house)
        self._get: dict[str, Getter] = {
            "/": Page(status.health).get,
            "/health": status.health,
            "/ping": status.health,
            "/info": status.info,
            "/metrics": status.metrics,
            "/v1/models": models.list,
            "/tokenizer_info": tokens.info,
            "/docs": documents.lead,
            "/docs/": documents.page,
            "/openapi.json": documents.openapi,
            "/api-doc/openapi.json": documents.openapi,
        }
        self._post: dict[str, Poster] = {
            "/": native.compat_generate,
            "/generate": native.generate,
            "/generate_stream": native.generate_stream,
            "/invocations": cloud.invocations,
            "/vertex": cloud.vertex,
            "/tokenize": tokens.tokenize,
            "/chat_tokenize": native.chat_tokenize,
            "/detokenize": tokens.detokenize,
            "/v1/chat/completions": chat.completions,
            "/v1/completions": completions.completions,
            "/v1/embeddings": embeddings.embeddings,
            "/v1/responses": Responses(house).responses,
            "/v1/messages": messages.messages,
            "/v1/messages/count_tokens": messages.count_tokens,
            "/v1/load_lora_adapter": adapters.load,
            "/v1/unload_lora_adapter": adapters.unload,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        tracer = self._house.tracer
        with journal.entry(exchange, scope.get("penstock.key_name", ""), tracer.record if tracer else None):
            await self._answer_or_refuse(exchange)

    async def _answer_or_refuse(self, exchange: Exchange) -> None:
        try:
            await self._route(exchange)
        except ClientLeft:
            pass
        except Refusal as refusal:
            self._count(refusal)
            await exchange.refuse(refusal)
        except Exception:  # a fault of ours ends one request, never the server
            log.exception("request %s failed", exchange.request_id.decode())
            await exchange.refuse(internal())

    async def _route(self, exchange: Exchange) -> None:
        if exchange.path.startswith(BATCH_PREFIXES):
            await self.batches.answer(exchange)
            return
        get, post = self._get.get(exchange.path), self._post.get(exchange.path)
        if exchange.path.startswith(MODEL_PREFIX):
            get = self._model
        if get is None and post is None:
            await self._not_found(exchange)
        elif get is not None and exchange.method in ("GET", "HEAD"):
            await get(exchange)
        elif post is not None and exchange.method == "POST":
            await self._answer(exchange, post)
        else:
            allow = ["GET", "HEAD"] * (get is not None) + ["POST"] * (post is not None)
            await exchange.answer(405, b"", headers=[(b"allow", ",".join(allow).encode())])

    async def _answer(self, exchange: Exchange, handler: Poster) -> None:
        house = self._house
        if house.draining:
            raise draining()
        with house.presence.enter():
            house.metrics.connections.set(house.presence.count)
            try:
                raw = await exchange.body(house.config.payload_limit, house.config.body_seconds)
                await exchange.while_connected(handler(exchange, raw))
            finally:
                house.metrics.connections.set(house.presence.count - 1)

    @staticmethod
    async def _not_found(exchange: Exchange) -> None:
        if exchange.openai:
            await exchange.refuse(Refusal(404, "There is no such route", "not_found"))
        else:
            await exchange.answer(404, b"")

    def _count(self, refusal: Refusal) -> None:
        label = "template" if refusal.error_type == "template_error" else _LABELS.get(refusal.status)
        if label is not None and not refusal.counted and not refusal.plain:
            self._house.metrics.failed(label)
