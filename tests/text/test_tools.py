"""What clients may call tools, and which take part."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.text.tools_definitions import MAX_TOOLS, InvalidTools, Tool, ToolChoice, read_choice, read_tools

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
EMPTY = {"type": "object", "properties": {}}


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def nested(depth: int) -> dict[str, Any]:
    return {"properties": {"a": json.loads('{"items":' * depth + "{}" + "}" * depth)}}


def test_the_shapes_in_which_clients_send_tools() -> None:
    chat = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA, "strict": True}}
    assert read_tools([chat]) == (Tool("f", "d", SCHEMA, True),)
    assert read_tools([{"type": "function", "name": "f", "parameters": SCHEMA}]) == (Tool("f", "", SCHEMA),)
    assert read_tools([function(arguments=SCHEMA)]) == (Tool("f", "", SCHEMA),)
    assert read_tools([function(parameters=None, description=None, strict=None)]) == (Tool("f", "", EMPTY),)
    assert read_tools([function(parameters={})]) == (Tool("f", "", EMPTY),)
    assert read_tools(None) == read_tools([]) == ()


@pytest.mark.parametrize(
    ("tools", "param", "says"),
    [
        ({}, "tools", "must be a list"),
        ([1], "tools[0]", "must be an object"),
        ([{"type": "web_search"}], "tools[0].type", 'must be "function". Given: "web_search"'),
        ([{"type": "function"}], "tools[0].function", "must be an object"),
        ([{"type": "function", "function": {}}], "tools[0].function.name", "Given: null"),
        ([function(name="my tool")], "tools[0].function.name", 'Given: "my tool"'),
        ([function(name="")], "tools[0].function.name", "1 to 64"),
        ([function(name="x" * 65)], "tools[0].function.name", "1 to 64"),
        ([function(name="f\n")], "tools[0].function.name", "1 to 64"),
        ([{"type": "function", "name": 3}], "tools[0].name", "Given: 3"),
        ([function(), function(name="g"), function()], "tools[2].function.name", "'f' is the name of an earlier tool"),
        ([function(description=[])], "tools[0].function.description", "must be a string"),
        ([function(strict=1)], "tools[0].function.strict", "true or false"),
        ([function(parameters=[])], "tools[0].function.parameters", "so an object"),
        ([function(parameters={"type": "array"})], "tools[0].function.parameters.type", 'must be "object"'),
        ([function(parameters={"properties": []})], "tools[0].function.parameters.properties", "must be an object"),
        ([function(parameters={"required": "a"})], "tools[0].function.parameters.required", "list of strings"),
        ([function(parameters=nested(100))], "tools[0].function.parameters", "nested more than 64 deep"),
        ([function(parameters={"title": "x" * 70000})], "tools[0].function.parameters", "at most 65536"),
        ([function(name=f"f{i}") for i in range(MAX_TOOLS + 1)], "tools", "at most 128 entries. Given: 129"),
    ],
)
def test_a_wrong_tool_is_named_by_its_field(tools: object, param: str, says: str) -> None:
    with pytest.raises(InvalidTools) as caught:
        read_tools(tools)
    assert caught.value.param == param
    assert param in caught.value.what
    assert says in caught.value.what


def test_choices() -> None:
    tools = [Tool("f"), Tool("required_one")]
    assert read_choice(None, tools) == read_choice("auto", tools) == ToolChoice("auto")
    assert read_choice("none", tools) == ToolChoice("none")
    assert read_choice("required", tools) == ToolChoice("required")
    named = ToolChoice("required", "f")
    assert read_choice("f", tools) == named
    assert read_choice({"type": "function", "function": {"name": "f"}}, tools) == named
    assert read_choice({"type": "function", "name": "f"}, tools) == named
    some = {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]}
    allowed = ToolChoice("required", allowed=frozenset(["f"]))
    assert read_choice({"type": "allowed_tools", "allowed_tools": some}, tools) == allowed
    assert read_choice({"type": "allowed_tools", "mode": "required", "tools": [{"name": "f"}]}, tools) == allowed
    for unknown in ("x", {"type": "allowed_tools", "tools": [{"type": "function", "name": "x"}]}):
        with pytest.raises(InvalidTools, match="Tool with name x not found"):
            read_choice(unknown, tools)


@pytest.mark.parametrize(
    "choice",
    [3, [], {}, {"type": "function"}, {"type": "tool", "name": "f"}, {"function": "f"}, {"type": "allowed_tools"},
     {"type": "allowed_tools", "mode": "none", "tools": ["f"]}, {"type": "allowed_tools", "tools": [3]}],
)  # fmt: skip
def test_other_choices_are_refused(choice: object) -> None:
    with pytest.raises(InvalidTools, match="`tool_choice") as caught:
        read_choice(choice, [Tool("f")])
    assert caught.value.param == "tool_choice"
