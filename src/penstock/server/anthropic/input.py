"""Anthropic's messages, tools and choices in the shape of /v1/chat/completions."""

from __future__ import annotations

import json
from typing import Any

from penstock.server.anthropic.wire import AnthropicMessage, CountRequest, MessagesRequest
from penstock.server.openai.fields import unsupported
from penstock.server.openai.wire import (
    ChatMessage,
    ChatRequest,
    FunctionCall,
    ImagePart,
    Part,
    TextPart,
    ToolCall,
    plain,
)
from penstock.server.refusal import Refusal, invalid

_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_of(body: CountRequest) -> ChatRequest:
    """The same request as a chat. Raises Refusal 422."""
    messages: list[ChatMessage] = []
    system = _text(body.system or "", "system")
    if system:
        messages.append(ChatMessage(role="system", content=system))
    for place, message in enumerate(body.messages):
        messages += _messages(message, f"messages[{place}]")
    chat = ChatRequest(messages=messages, model=body.model)
    chat.tools = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(body.tools or [])]
    if body.tool_choice is not None:
        chat.tool_choice = _choice(body.tool_choice)
        chat.parallel_tool_calls = not body.tool_choice.get("disable_parallel_tool_use", False)
    if body.thinking is not None:  # the name that templates of reasoning models know
        chat.chat_template_kwargs = {"enable_thinking": body.thinking.get("type") != "disabled"}
    if isinstance(body, MessagesRequest):
        chat.max_tokens, chat.stop = body.max_tokens, body.stop_sequences
        chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
    _take_output(chat, body.output_config or {})
    return chat


def _take_output(chat: ChatRequest, config: dict[str, Any]) -> None:
    """`output_config`: how long to think, for templates that know it, and the schema of the answer."""
    effort, form = config.get("effort"), config.get("format")
    if not isinstance(effort, str | None):
        raise _misfit("output_config.effort", "a string")
    chat.reasoning_effort = effort
    if form is None:
        return
    if not isinstance(form, dict) or form.get("type") != "json_schema" or "schema" not in form:
        raise _misfit("output_config.format", "an object of type json_schema with a `schema`")
    chat.response_format = {"type": "json_schema", "json_schema": form}


def _messages(message: AnthropicMessage, where: str) -> list[ChatMessage]:
    """One message of Anthropic's is several here where it holds tool results."""
    if isinstance(message.content, str):
        return [ChatMessage(role=message.role, content=message.content)]
    results: list[ChatMessage] = []
    parts: list[Part] = []
    calls: list[ToolCall] = []
    thoughts: list[str] = []
    for place, block in enumerate(message.content):
        path = f"{where}.content[{place}]"
        match block.get("type"):
            case "text":
                parts.append(TextPart(_string(block, "text", path)))
            case "image":
                parts.append(ImagePart(_address(block, path)))
            case "thinking":
                thoughts.append(_string(block, "thinking", path))
            case "redacted_thinking":
                pass  # nobody but its maker can read it
            case "tool_use":
                function = FunctionCall(_string(block, "name", path), json.dumps(block.get("input") or {}))
                calls.append(ToolCall(id=_string(block, "id", path), function=function))
            case "tool_result":
                identity = _string(block, "tool_use_id", path)
                text = _text(block.get("content") or "", f"{path}.content")
                results.append(ChatMessage(role="tool", content=text, tool_call_id=identity))
            case other:
                raise unsupported(str(other)[:64], "this server takes text, images and tools", path)
    said = ChatMessage(role=message.role, content=plain(parts) if parts or not calls else None)
    said.tool_calls, said.reasoning_content = calls or None, "".join(thoughts) or None
    return [*results, said] if parts or calls or not results else results


def _address(block: dict[str, Any], where: str) -> str:
    """Where an image is: its bytes as a data URL, or an address on the web."""
    source = block.get("source")
    if not isinstance(source, dict) or source.get("type") not in ("base64", "url"):
        raise invalid(f"{where}.source must be of type base64 or url", where)
    if source["type"] == "url":
        return _string(source, "url", f"{where}.source")
    kind, data = _string(source, "media_type", f"{where}.source"), _string(source, "data", f"{where}.source")
    return f"data:{kind};base64,{data}"


def _tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    kind = tool.get("type", "custom")
    if kind != "custom":
        raise unsupported(str(kind)[:64], "tools are functions of the client", where)
    function = {"name": _string(tool, "name", where), "description": tool.get("description") or ""}
    return {"type": "function", "function": {**function, "parameters": tool.get("input_schema") or {}}}


def _choice(choice: dict[str, Any]) -> Any:
    kind = choice.get("type")
    if kind == "tool":
        return {"type": "function", "function": {"name": _string(choice, "name", "tool_choice")}}
    if not isinstance(kind, str) or kind not in _CHOICES:
        raise invalid("`tool_choice.type` must be auto, any, tool or none", "tool_choice")
    return _CHOICES[kind]


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise _misfit(where, "a string or a list of blocks")
    for block in content:
        if block.get("type") != "text":
            raise unsupported(str(block.get("type"))[:64], "this server takes text", where)
    return "".join(_string(block, "text", where) for block in content)


def _string(block: dict[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise _misfit(f"{where}.{name}", "a string")
    return value


def _misfit(path: str, wanted: str) -> Refusal:
    return invalid(f"{path} must be {wanted}", path)
