"""The OpenAPI document, made from the types of the table of operations, and the page that shows it."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

from penstock import __version__
from penstock.server.exchange import JSON_TYPE, Exchange
from penstock.server.native.operations import NATIVE
from penstock.server.native.wire import ErrorResponse
from penstock.server.openai.operations import OPENAI
from penstock.server.operations import EVENTS, JSON, TEXT, Operation
from penstock.server.page import policy

OPERATIONS = (*NATIVE, *OPENAI)  # the whole table

_DESCRIPTIONS = {
    303: "Leads elsewhere",
    400: "The body is not JSON, or a parameter is wrong",
    401: "The key is missing or wrong",
    403: "The host name is not one of this server's",
    404: "There is no such route or model",
    405: "The route has other methods",
    408: "The body did not arrive in time",
    409: "What the path names is in use, or over",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    422: "A field, or the prompt, breaks a rule",
    424: "The engine failed while computing the answer",
    429: "All places are taken",
    500: "A fault of the server's",
    503: "The server is loading, restarting or stopping",
}
_EMPTY = (401, 403, 404, 405)  # TGI answers these with nothing
_PLAIN = (400, 408, 413, 415, 422)  # and these with a line of text; 422 with JSON too


class OpenAIError(msgspec.Struct):
    """OpenAI's JSON of an error; under /v1/messages Anthropic's, which has the same key."""

    error: dict[str, Any]


class Documents:
    """The routes."""

    def __init__(self) -> None:
        self._html = (files("penstock.server") / "docs.html").read_bytes()
        self._headers = [(b"content-security-policy", policy(self._html))]

    async def openapi(self, exchange: Exchange) -> None:
        """GET /openapi.json."""
        await exchange.answer(200, encoded(), JSON_TYPE)

    async def lead(self, exchange: Exchange) -> None:
        """GET /docs: to /docs/, as TGI does."""
        await exchange.answer(303, b"", headers=[(b"location", b"/docs/")])

    async def page(self, exchange: Exchange) -> None:
        """GET /docs/."""
        await exchange.answer(200, self._html, b"text/html; charset=utf-8", self._headers)


@cache
def encoded() -> bytes:
    """The document as JSON."""
    return msgspec.json.encode(document(list(OPERATIONS)))


def document(operations: list[Operation]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of some operations."""
    types = {ErrorResponse, OpenAIError}
    kinds: list[Any] = []
    for operation in operations:
        kinds += [kind for kind in (*operation.bodies, operation.answer, operation.event) if kind is not None]
    kinds += types
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    schema_of = {id(kind): schema for kind, schema in zip(kinds, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Text Generation Inference",
            "description": "The API of TGI and of OpenAI, served by Penstock.",
            "license": {"name": "Apache 2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
            "version": __version__,
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"x-api-key": []}],
    }


def _operation(operation: Operation, schema_of: dict[int, Any]) -> dict[str, Any]:
    openai = operation.path.startswith("/v1/")
    described: dict[str, Any] = {
        "summary": operation.summary,
        "tags": [operation.tag],
        "operationId": operation.method + re.sub(r"\W+", "_", operation.path),
        "responses": {"303" if operation.redirects else "200": _success(operation, schema_of)},
    }
    for status in operation.statuses:
        described["responses"][str(status)] = _error(status, openai)
    parameters = re.findall(r"{(\w+)}", operation.path)
    if parameters or operation.query:
        text = {"type": "string", "minLength": 1}
        described["parameters"] = [
            *({"name": n, "in": "path", "required": True, "schema": text} for n in parameters),
            *({"name": n, "in": "query", "required": False, "schema": {"type": "string"}} for n in operation.query),
        ]
    if operation.bodies:
        content: dict[str, Any] = {"schema": _body(operation, [schema_of[id(kind)] for kind in operation.bodies])}
        if operation.example is not None:
            content["example"] = operation.example
        described["requestBody"] = {"required": True, "content": {operation.takes: content}}
    return described


def _event(schema: Any, done: bool = False) -> dict[str, Any]:
    """A server-sent event; its data is JSON. done: the last one is `[DONE]`."""
    data: dict[str, Any] = {"type": "string", "contentMediaType": JSON, "contentSchema": schema}
    if done:
        data = {"anyOf": [{"const": "[DONE]"}, data]}
    return {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}


def _body(operation: Operation, schemas: list[Any]) -> Any:
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    if operation.many is None:
        return schema
    items = {"type": "array", "items": schema, "minItems": 1}
    return {"type": "object", "properties": {operation.many: items}, "required": [operation.many]}


def _success(operation: Operation, schema_of: dict[int, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.answer is not None:
        schema = schema_of[id(operation.answer)]
        content[operation.content_type] = {"schema": _event(schema) if operation.content_type == EVENTS else schema}
    if operation.event is not None:
        done = operation.tag == "openai" or len(operation.bodies) > 1  # /invocations takes OpenAI's bodies too
        content[EVENTS] = {"schema": _event(schema_of[id(operation.event)], done)}
    response: dict[str, Any] = {"description": "Leads elsewhere" if operation.redirects else "It worked"}
    if content:
        response["content"] = content
    return response


def _error(status: int, openai: bool) -> dict[str, Any]:
    response: dict[str, Any] = {"description": _DESCRIPTIONS[status]}
    if openai and status != 405:
        response["content"] = {JSON: {"schema": {"$ref": "#/components/schemas/OpenAIError"}}}
    elif status in _PLAIN:
        response["content"] = {TEXT: {"schema": {"type": "string"}}}
    if not openai and status not in (*_EMPTY, 400, 408, 413, 415):
        json_content = {JSON: {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}}
        response["content"] = {**response.get("content", {}), **json_content}
    if status in (429, 503):
        response["headers"] = {"retry-after": {"description": "Seconds", "schema": {"type": "integer"}}}
    return response
