"""The routes of cloud platforms: SageMaker's /invocations and Vertex AI's /vertex."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from penstock.server.body import check_syntax, fits, parse, refusal
from penstock.server.exchange import Exchange, Message
from penstock.server.native import wire
from penstock.server.native.generate import Native
from penstock.server.openai.wire import ChatRequest, CompletionRequest
from penstock.server.refusal import Refusal
from penstock.server.scanner import Scanner
from penstock.server.serde import Complaint, complaint

Route = Callable[[Exchange, bytes], Awaitable[None]]

_NO_VARIANT = "data did not match any variant of untagged enum {}"


class VertexRequest(msgspec.Struct):
    """Body of /vertex: prompts, conversations, or both."""

    instances: list[msgspec.Raw]


class Cloud:
    """The routes. They only tell which kind of request a body is, and pass it on."""

    def __init__(self, native: Native, chat: Route, completions: Route) -> None:
        self._native, self._chat = native, chat
        self._kinds: list[tuple[type, Route]] = [
            (wire.CompatGenerateRequest, native.compat_generate),
            (ChatRequest, chat),
            (CompletionRequest, completions),
        ]

    async def invocations(self, exchange: Exchange, raw: bytes) -> None:
        """POST /invocations: the body of POST /, of a chat or of a completion, tried in this order."""
        check_syntax(raw)
        for kind, route in self._kinds:
            if fits(raw, kind):
                await route(exchange, raw)
                return
        raise refusal(Complaint(_NO_VARIANT.format("SagemakerRequest"), "", 0, 0, syntax=False))

    async def vertex(self, exchange: Exchange, raw: bytes) -> None:
        """POST /vertex: a text for every instance."""
        instances = [bytes(instance) for instance in parse(raw, VertexRequest).instances]
        if not instances:
            raise Refusal(422, "Input validation error", "Input validation error")
        for number, instance in enumerate(instances):
            if not fits(instance, wire.VertexInstance) and not fits(instance, ChatRequest):
                message = _NO_VARIANT.format("VertexInstance")
                raise refusal(complaint(raw, message, _behind_instance(raw, number), f"instances[{number}]"))
        tasks = [asyncio.create_task(self._predict(exchange, instance)) for instance in instances]
        try:
            predictions = await asyncio.gather(*tasks)
        finally:  # when one fails or the client leaves, the others are aborted
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await exchange.answer_json(wire.VertexResponse(predictions))

    async def _predict(self, exchange: Exchange, raw: bytes) -> str:
        if fits(raw, wire.VertexInstance):
            instance = parse(raw, wire.VertexInstance)
            body = wire.GenerateRequest(inputs=instance.inputs)
            if instance.parameters is not None:
                body.parameters = instance.parameters
            response, _ = await self._native.whole(exchange, body)
            return response.generated_text
        answer = await _answer_of(self._chat, exchange, raw)
        text: str | None = answer["choices"][0]["message"].get("content")
        return text or ""


def _behind_instance(raw: bytes, number: int) -> int:
    """Where serde_json complains of an instance: behind the bracket that follows it, or the comma and its blanks."""
    scanner = Scanner(raw)
    scanner.start()
    scanner.at += 1
    first = True
    while (key := scanner.key(first)) != "instances" and key is not None:
        first = False
        scanner.colon()
        scanner.skip()
    scanner.colon()
    scanner.start()
    scanner.at += 1
    for n in range(number + 1):
        scanner.element(n == 0)
        scanner.skip()
    comma = scanner.peek() == b","
    scanner.at += 1
    if comma:
        scanner.peek()
    return scanner.at


async def _answer_of(route: Route, exchange: Exchange, raw: bytes) -> Any:
    """What a route answers, for us instead of the client. Raises Refusal."""
    parts: list[bytes] = []

    async def keep(message: Message) -> None:
        parts.append(message.get("body", b""))

    body = msgspec.json.decode(raw)
    body["stream"] = False
    await route(exchange.answered_by(keep), msgspec.json.encode(body))
    return msgspec.json.decode(b"".join(parts))
