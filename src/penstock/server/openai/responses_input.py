"""The `input` of /v1/responses as messages of a chat."""

from __future__ import annotations

import json
from typing import Any

from penstock.server.openai.fields import unsupported
from penstock.server.openai.wire import ChatMessage, FunctionCall, ImagePart, Part, TextPart, ToolCall
from penstock.server.refusal import Refusal, invalid

_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}


def messages_of(given: str | list[Any], instructions: str | None) -> list[ChatMessage]:
    """The conversation. Raises Refusal 422 naming the item that cannot be used."""
    found: list[ChatMessage] = []
    if instructions:
        found.append(ChatMessage(role="system", content=instructions))
    if isinstance(given, str):
        return [*found, ChatMessage(role="user", content=given)]
    reasoning = ""
    for place, item in enumerate(given):
        where = f"input[{place}]"
        if not isinstance(item, dict):
            raise invalid(f"{where} must be an object", "input")
        kind = item.get("type", "message")
        if kind == "message":
            message = _message(item, where)
        elif kind == "function_call":
            message = ChatMessage(role="assistant", tool_calls=[_call(item, where)])
        elif kind == "function_call_output":
            output = _text(item.get("output"), f"{where}.output")
            message = ChatMessage(role="tool", content=output, tool_call_id=_string(item, "call_id", where))
        elif kind == "reasoning":
            reasoning += "".join(_texts(item.get("content") or [], f"{where}.content"))
            continue
        else:
            raise unsupported(str(kind)[:64], "input items are messages, function calls and their outputs", where)
        if message.role == "assistant":
            message.reasoning_content, reasoning = reasoning or None, ""
            if _joins(found, message):
                continue
        found.append(message)
    return found


def _joins(found: list[ChatMessage], message: ChatMessage) -> bool:
    """Calls belong to the assistant's message before them: one turn of the chat, several items here."""
    last = found[-1] if found else None
    if last is None or last.role != "assistant" or not message.tool_calls:
        return False
    last.tool_calls = [*(last.tool_calls or []), *message.tool_calls]
    last.reasoning_content = last.reasoning_content or message.reasoning_content
    return True


def _message(item: dict[str, Any], where: str) -> ChatMessage:
    role, content = _string(item, "role", where), item.get("content")
    if not isinstance(content, list) or not any(map(_is_image, content)):
        return ChatMessage(role=role, content=_text(content, f"{where}.content"))
    parts: list[Part] = []
    for part in content:
        if _is_image(part):
            parts.append(ImagePart(_string(part, "image_url", f"{where}.content")))
        else:
            parts.append(TextPart("".join(_texts([part], f"{where}.content"))))
    return ChatMessage(role=role, content=parts)


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "input_image"


def _call(item: dict[str, Any], where: str) -> ToolCall:
    arguments = item.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {})
    function = FunctionCall(_string(item, "name", where), arguments)
    return ToolCall(id=_string(item, "call_id", where), function=function)


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{where} must be a string or a list of parts", "input")
    return "".join(_texts(content, where))


def _texts(parts: Any, where: str) -> list[str]:
    found: list[str] = []
    for part in parts if isinstance(parts, list) else []:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "reasoning_text":
            found.append(str(part.get("text", "")))
            continue
        if not isinstance(kind, str) or kind not in _TEXTS:
            raise unsupported(str(kind)[:64], "this server takes text and images", where)
        found.append(_string(part, _TEXTS[kind], where))
    return found


def _string(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise _misfit(f"{where}.{name}")
    return value


def _misfit(path: str) -> Refusal:
    return invalid(f"{path} must be a string", "input")
