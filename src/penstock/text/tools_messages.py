"""Conversations with tools, made ready for chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.text.chat_template import ChatTemplate
    from penstock.text.tools_definitions import Tool
    from penstock.text.tools_format import ToolFormat

Messages = list[dict[str, Any]]

_REASONING = ("reasoning_content", "reasoning", "thinking")
_TESTS_NONE = re.compile(r"""content['"]?\]?\s+is\s+(not\s+)?none""", re.IGNORECASE)
_HOW = (
    'To call one, answer with JSON and nothing else: {"name": FUNCTION_NAME, "arguments": {ARGUMENT_NAME: VALUE}}, '
    "or a list of several such objects. Give every required argument its value."
)
_MAY = "Call functions only when they help; otherwise answer in plain words."
_MUST = "Your answer has to be such a call."


def template_messages(messages: Sequence[Mapping[str, Any]], template: ChatTemplate, image: str = "") -> Messages:
    """Messages as OpenAI's clients send them, in the form that templates are written for.

    Contents in parts become one string, `image` in the place of each image, or stay as they are where there are images
    and the template goes through parts; the arguments of calls become objects; a tool's message gets the name that
    its id stands for; the role "developer" becomes "system" where the template does not know it; reasoning has the
    names that templates use. Nothing else is touched.
    """
    names: dict[str, str] = {}
    ready: Messages = []
    for message in messages:
        made = {key: value for key, value in message.items() if value is not None or key == "content"}
        parts = made.get("content")
        if isinstance(parts, list) and not (template.takes_parts and any(map(_is_image, parts))):
            made["content"] = "".join(image if _is_image(part) else _text(part) for part in parts)
        if made.get("role") == "developer" and not template.mentions("developer"):
            made["role"] = "system"
        if made.get("tool_calls"):
            made["tool_calls"] = [_call(call) for call in made["tool_calls"]]
            names |= {call["id"]: call["function"]["name"] for call in made["tool_calls"] if "id" in call}
            if not made.get("content"):
                # Most templates print what is there, some take only None as a sign that there are calls.
                made["content"] = None if template.mentions_match(_TESTS_NONE) else ""
        else:
            made.pop("tool_calls", None)
            made["content"] = made.get("content") or ""
        if made.get("role") == "tool" and not made.get("name") and made.get("tool_call_id") in names:
            made["name"] = names[made["tool_call_id"]]
        reasoning = next((made[key] for key in _REASONING if made.get(key)), None)
        if reasoning is not None:
            made |= {"reasoning_content": reasoning, "thinking": made.get("thinking", reasoning)}
        ready.append(made)
    return ready


def described(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The tools in the form that templates expect."""
    return [
        {
            "type": "function",
            "function": {"name": tool.name, "description": tool.description, "parameters": tool.parameters},
        }
        for tool in tools
    ]


def tell_tools(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool], native: bool, must: bool, prompt: str
) -> Messages:
    """The messages with what has to be said about the tools.

    native: the template says it, and only the client's own words, `prompt`, are added to the last message. Otherwise
    the tools stand in the system message, or before the first message, and calls and results are plain text.
    """
    if native:
        ready = [dict(message) for message in messages]
        if prompt and ready and isinstance(ready[-1].get("content"), str):
            ready[-1]["content"] += f"\n---\n{prompt}"
        return ready
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in described(tools))
    words = prompt or f"{_HOW} {_MUST if must else _MAY}"
    text = f"You can call these functions:\n{functions}\n\n{words}"
    ready = plain_messages(messages)
    if not ready:
        return [{"role": "user", "content": text}]
    first = ready[0]["content"] or ""
    ready[0]["content"] = f"{first}\n\n{text}" if ready[0]["role"] == "system" else _joined(text, first)
    return ready


def with_system_tools(messages: Messages, tools: Sequence[Tool], format: ToolFormat) -> Messages:
    """The messages for templates that take the tools from the system message, and print nothing of calls."""
    ready = list(messages)
    if not ready or ready[0].get("role") != "system":
        ready.insert(0, {"role": "system", "content": ""})
    functions = [tool["function"] for tool in described(tools)]
    ready[0] = {**ready[0], "tools": json.dumps(functions, ensure_ascii=False)}
    for i, message in enumerate(ready):
        if message.get("tool_calls"):
            calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
            written = format.before + (format.between or "").join(calls) + format.after
            ready[i] = {**message, "content": (message.get("content") or "") + written}
    return ready


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> Messages:
    """Calls and results as text, for templates that know neither. Results count as the user's words.

    Messages that would then follow one of the same role are joined with it: many templates insist on turns.
    """
    ready: Messages = []
    turned = False  # whether the message before was made of a result
    for message in messages:
        made = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
        result = made["role"] == "tool"
        if result:
            name = made.pop("name", None)
            made |= {"role": "user", "content": f"Result of {name or 'the call'}:\n{made.get('content') or ''}"}
        elif message.get("tool_calls"):
            calls = json.dumps([call["function"] for call in message["tool_calls"]], ensure_ascii=False)
            made["content"] = f"{made['content']}\n{calls}" if made.get("content") else calls
        if ready and (result or turned) and made["role"] == "user" == ready[-1]["role"]:
            ready[-1]["content"] = _joined(ready[-1]["content"], made["content"])
        else:
            ready.append(made)
        turned = result
    return ready


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call of an earlier answer. Arguments that are no JSON object, of a call cut short, stay a string."""
    function = call.get("function") or {}
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) or arguments is None:
        try:
            read = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            read = None
        arguments = read if isinstance(read, dict) else arguments
    made = {"type": "function", "function": {"name": function.get("name", ""), "arguments": arguments}}
    return made if call.get("id") is None else {"id": call["id"], **made}


def _is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image"


def _joined(first: Any, second: Any) -> Any:
    """Two contents as one, which is a list of parts where either is."""
    if isinstance(first, list) or isinstance(second, list):
        between = {"type": "text", "text": "\n\n"}
        return [*_parts(first), between, *_parts(second)]
    return f"{first}\n\n{second}"


def _parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _text(part: Any) -> str:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, Mapping) else None
    return text if isinstance(text, str) else ""
