"""What a client may call a tool, and which of them take part."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from penstock.errors import InvalidRequest

MAX_TOOLS = 128
MAX_SCHEMA = 64 * 1024  # characters of JSON
MAX_DEPTH = 64
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


class InvalidTools(InvalidRequest):
    """A tool's definition or the choice among them is wrong. param: the field, as in `tools[0].function.name`."""

    def __init__(self, what: str, param: str) -> None:
        super().__init__(what)
        self.param = param


@dataclass(frozen=True)
class Tool:
    """A function that the model may call. parameters: the JSON schema of its arguments, an object's."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False


@dataclass(frozen=True)
class ToolChoice:
    """auto: the model decides; required: it must call. name: it must call this one. allowed: only these may be."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None
    allowed: frozenset[str] | None = None


def read_tools(raw: object) -> tuple[Tool, ...]:
    """The tools of a request, from its JSON: `{"type": "function", "function": {...}}`, or flat as in /v1/responses.

    `parameters` may be called `arguments`, as in TGI, and be absent for a function without any. Raises InvalidTools.
    """
    if raw is None:
        return ()
    if not isinstance(raw, list):
        raise InvalidTools("`tools` must be a list", "tools")
    if len(raw) > MAX_TOOLS:
        raise InvalidTools(f"`tools` must have at most {MAX_TOOLS} entries. Given: {len(raw)}", "tools")
    tools: dict[str, Tool] = {}
    for i, entry in enumerate(raw):
        tool, where = _tool(entry, f"tools[{i}]")
        if tool.name in tools:
            raise InvalidTools(f"`{where}.name` {tool.name!r} is the name of an earlier tool", f"{where}.name")
        tools[tool.name] = tool
    return tuple(tools.values())


def _tool(entry: Any, where: str) -> tuple[Tool, str]:
    """A tool and the path of its fields."""
    if not isinstance(entry, dict):
        raise InvalidTools(f"`{where}` must be an object", where)
    kind = entry.get("type", "function")
    if kind != "function":
        raise InvalidTools(f'`{where}.type` must be "function". Given: {_shown(kind)}', f"{where}.type")
    function: Any = entry
    if "function" in entry or "name" not in entry:
        function, where = entry.get("function"), f"{where}.function"
        if not isinstance(function, dict):
            raise InvalidTools(f"`{where}` must be an object", where)
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        rule = "must be 1 to 64 letters, digits, underscores, dashes or dots"
        raise InvalidTools(f"`{where}.name` {rule}. Given: {_shown(name)}", f"{where}.name")
    description = function.get("description")
    if not isinstance(description, str | None):
        raise InvalidTools(f"`{where}.description` must be a string", f"{where}.description")
    strict = function.get("strict")
    if not isinstance(strict, bool | None):
        raise InvalidTools(f"`{where}.strict` must be true or false", f"{where}.strict")
    key = "arguments" if "arguments" in function and "parameters" not in function else "parameters"
    parameters = _parameters(function.get(key), f"{where}.{key}")
    return Tool(name, description or "", parameters, bool(strict)), where


def _parameters(schema: Any, where: str) -> dict[str, Any]:
    if schema is None:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidTools(f"`{where}` must be a JSON schema, so an object", where)
    if schema.get("type", "object") != "object":
        raise InvalidTools(f'`{where}.type` must be "object". Given: {_shown(schema["type"])}', f"{where}.type")
    if not isinstance(schema.get("properties", {}), dict):
        raise InvalidTools(f"`{where}.properties` must be an object", f"{where}.properties")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise InvalidTools(f"`{where}.required` must be a list of strings", f"{where}.required")
    if _deeper(schema, MAX_DEPTH):
        raise InvalidTools(f"`{where}` is nested more than {MAX_DEPTH} deep", where)
    size = len(json.dumps(schema, ensure_ascii=False))
    if size > MAX_SCHEMA:
        raise InvalidTools(f"`{where}` must have at most {MAX_SCHEMA} characters of JSON. Given: {size}", where)
    return {"type": "object", "properties": {}, **schema}


def read_choice(raw: object, tools: Sequence[Tool]) -> ToolChoice:
    """Which tools are to be called: "auto", "none", "required", a name, or one of OpenAI's objects.

    Raises InvalidTools, also for a name that no tool has.
    """
    if raw is None or raw == "auto":
        return ToolChoice("auto")
    if raw == "none":
        return ToolChoice("none")
    if raw == "required":
        return ToolChoice("required")
    if isinstance(raw, dict) and raw.get("type") == "allowed_tools":
        return _allowed(raw.get("allowed_tools", raw), tools)
    return ToolChoice("required", _known(_name(raw), tools))


def _allowed(raw: Any, tools: Sequence[Tool]) -> ToolChoice:
    """OpenAI's choice of some of the tools."""
    entries = raw.get("tools") if isinstance(raw, dict) else None
    mode = raw.get("mode", "auto") if isinstance(raw, dict) else None
    if mode not in ("auto", "required") or not isinstance(entries, list) or not entries:
        raise InvalidTools('`tool_choice.allowed_tools` needs `mode`, "auto" or "required", and `tools`', "tool_choice")
    return ToolChoice(mode, allowed=frozenset(_known(_name(entry), tools) for entry in entries))


def _name(raw: Any) -> Any:
    """The name in a string or in OpenAI's object."""
    if not isinstance(raw, dict) or raw.get("type", "function") != "function":
        return raw
    function = raw.get("function", raw)
    return function.get("name") if isinstance(function, dict) else None


def _known(name: Any, tools: Sequence[Tool]) -> str:
    """The name, if it is one and a tool has it."""
    if not isinstance(name, str):
        form = '{"type": "function", "function": {"name": NAME}}'
        raise InvalidTools(f'`tool_choice` must be "auto", "none", "required", a name or {form}', "tool_choice")
    if name not in (tool.name for tool in tools):
        raise InvalidTools(f"Tool with name {name} not found", "tool_choice")
    return name


def _deeper(value: Any, limit: int) -> bool:
    """Whether a JSON value is nested more than so deep."""
    level = [value]
    for _ in range(limit + 1):
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return False
    return True


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
