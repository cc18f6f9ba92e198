"""Tool calls in answers: what models write, cut in any way, and what only looks like a call."""

from __future__ import annotations

import itertools
import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text.answer import AnswerParser, Call, joined, whole
from penstock.text.answer_events import CallArguments, CallStart, Content, Event
from penstock.text.reasoning import ReasoningSplitter, ThinkTags
from penstock.text.tools_format import (
    COHERE,
    COHERE_ACTION,
    DEEPSEEK,
    DEEPSEEK_V31,
    FUNCTOOLS,
    GENERIC,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_ARGS,
    PHI4,
    ToolFormat,
)
from penstock.text.tools_parser import MAX_HELD, ToolParser

NAMES = ["get_weather", "f", "g"]
THINK = ThinkTags("<think>", "</think>")
FORMATS = [
    LLAMA3, HERMES, MISTRAL, MISTRAL_ARGS, DEEPSEEK, DEEPSEEK_V31, COHERE, COHERE_ACTION, PHI4, FUNCTOOLS, GENERIC,
]  # fmt: skip

# (format, thinking, answer, content, [(name, arguments)]): answers as models of each kind write them.
RECORDED: list[tuple[ToolFormat, bool, str, str | None, list[tuple[str, str]]]] = [
    (HERMES, False, "It is 4 °C in Oslo.\n", "It is 4 °C in Oslo.\n", []),
    (
        HERMES,
        False,
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo", "days": [1, 2.5e3, null]}}\n</tool_call>',
        None,
        [("get_weather", '{"city": "Oslo", "days": [1, 2.5e3, null]}')],
    ),
    (
        HERMES,
        False,
        'I shall look.\n\n<tool_call>\n{"name": "f", "arguments": {"a": "}]</tool_call> \\" \\u00e9 \\\\"}}\n'
        "</tool_call>\n"
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n',
        "I shall look.",
        [("f", '{"a": "}]</tool_call> \\" \\u00e9 \\\\"}'), ("g", "{}")],
    ),
    (HERMES, False, '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', None, [("f", '{"a": 1}')]),
    (HERMES, False, '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', None, [("f", '{"a": 1}')]),
    (HERMES, False, '<tool_call>{"name": "no_such", "arguments": null}</tool_call>', None, [("no_such", "{}")]),
    (HERMES, False, '<tool_call>{"name": "f"}\n{"name": "g"}</tool_call>', None, [("f", "{}"), ("g", "{}")]),
    (HERMES, False, '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>', None, [("f", '{"a": 1}')]),
    (HERMES, False, '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}', None, [("f", '{"a": "x\\ny"}')]),
    (HERMES, False, '<tool_call>{"name": "f", "arguments": {"city": "Os', None, [("f", '{"city": "Os')]),
    (
        HERMES,
        True,
        "<think>\nA <tool_call> is due.\n</think>\n\n"
        '<tool_call>\n{"name": "f", "arguments": {"a": "<think>"}}\n</tool_call>',
        None,
        [("f", '{"a": "<think>"}')],
    ),
    (HERMES, True, "<think>\n\n</think>\n\nHello <think>!", "Hello <think>!", []),
    (HERMES, False, "a <tool_call>oops</tool_call> b", "a <tool_call>oops</tool_call> b", []),
    (HERMES, False, '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    (HERMES, False, '<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', []),
    (HERMES, False, '<tool_call>{"name": "f", "arguments": [1]}', '<tool_call>{"name": "f", "arguments": [1]}', []),
    (HERMES, False, '<tool_call><tool_call>{"name":"f"}</tool_call>', "<tool_call>", [("f", "{}")]),
    (HERMES, False, '<tool_call>{"name": "f", "arguments": {"a": 1,}}', "}}", [("f", '{"a": 1,')]),
    (HERMES, False, '<tool_call>{"name": "f"}</tool_call>\n\nDone,\n\nbye. ', "Done,\n\nbye.", [("f", "{}")]),
    (
        LLAMA3,
        False,
        '{"name": "get_weather", "parameters": {"city": "Oslo"}}; {"name": "f", "parameters": {"b": -0.5}}',
        None,
        [("get_weather", '{"city": "Oslo"}'), ("f", '{"b": -0.5}')],
    ),
    (
        LLAMA3,
        False,
        '<|python_tag|>{"type": "function", "name": "f", "parameters": {"q": [[], {}]}}',
        None,
        [("f", '{"q": [[], {}]}')],
    ),
    (LLAMA3, False, 'Well.<|python_tag|>{"name": "f", "parameters": {}}', "Well.", [("f", "{}")]),
    (LLAMA3, False, '<|python_tag|>search.call(query="x")', '<|python_tag|>search.call(query="x")', []),
    (LLAMA3, False, '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    (LLAMA3, False, '{"animals": 3, "name": "f", "parameters": {}}', None, []),
    (
        MISTRAL,
        False,
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": "]"}}, {"name": "g", "arguments": {}, "id": "x"}]',
        None,
        [("f", '{"a": "]"}'), ("g", "{}")],
    ),
    (
        MISTRAL_ARGS,
        False,
        'Look:[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abcDEF123[ARGS]{"z": {}}',
        "Look:",
        [("f", '{"a": 1}'), ("g", '{"z": {}}')],
    ),
    (MISTRAL_ARGS, False, '[TOOL_CALLS]f{"a": 1}', None, [("f", '{"a": 1}')]),
    (MISTRAL_ARGS, False, "[TOOL_CALLS]not a call", "[TOOL_CALLS]not a call", []),
    (
        DEEPSEEK,
        False,
        "I look it up.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather\n```json\n"
        '{"city": "``` Oslo <｜tool▁call▁end｜>"}\n```<｜tool▁call▁end｜>\n'
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        "I look it up.",
        [("get_weather", '{"city": "``` Oslo <｜tool▁call▁end｜>"}'), ("f", "{}")],
    ),
    (
        DEEPSEEK_V31,
        True,
        "<think>Two calls.</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
        '{"city": "Oslo", "days": [1, 2]}<｜tool▁call▁end｜><｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜>",
        None,
        [("get_weather", '{"city": "Oslo", "days": [1, 2]}'), ("g", "{}")],
    ),
    (DEEPSEEK, False, "<｜tool▁calls▁begin｜> says the text", "<｜tool▁calls▁begin｜> says the text", []),
    (
        DEEPSEEK,
        False,
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"city": "Os',
        None,
        [("f", '{"city": "Os')],
    ),
    (
        COHERE,
        False,
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Oslo"}},\n'
        '    {"tool_call_id": "1", "tool_name": "f", "parameters": {"a": [{}]}}\n]<|END_ACTION|>',
        None,
        [("get_weather", '{"city": "Oslo"}'), ("f", '{"a": [{}]}')],
    ),
    (
        COHERE_ACTION,
        False,
        'I will look.\nAction: ```json\n[\n    {\n        "tool_name": "f",\n        "parameters": {\n'
        '            "a": "]"\n        }\n    }\n]```',
        "I will look.",
        [("f", '{\n            "a": "]"\n        }')],
    ),
    (COHERE_ACTION, False, "Action: none, I am sure.", "Action: none, I am sure.", []),
    (
        PHI4,
        False,
        '<|tool_call|>[{"name": "get_weather", "arguments": {"tags": ["a", "b"]}}, {"name": "f", "arguments": {}}]'
        "<|/tool_call|>",
        None,
        [("get_weather", '{"tags": ["a", "b"]}'), ("f", "{}")],
    ),
    (FUNCTOOLS, False, 'functools[{"name": "f", "arguments": {"a": ["]"]}}]', None, [("f", '{"a": ["]"]}')]),
    (FUNCTOOLS, False, "import functools\n", "import functools\n", []),
    (GENERIC, False, '```json\n[{"name": "f", "arguments": {"a": 1}}]\n```\n', None, [("f", '{"a": 1}')]),
    (GENERIC, False, '{"name": "f", "arguments": {}}', None, [("f", "{}")]),
    (GENERIC, False, '{"name": "f"}', '{"name": "f"}', []),
    (GENERIC, False, "[1] says so. ```x```", "[1] says so. ```x```", []),
]


def parser(format: ToolFormat, thinking: bool = False, parallel: bool = True) -> AnswerParser:
    numbers = itertools.count()
    tools = ToolParser(format, NAMES, parallel, new_id=lambda: f"id{next(numbers)}")
    return AnswerParser(ReasoningSplitter(THINK) if thinking else None, tools)


def events(parse: AnswerParser, pieces: list[str]) -> list[Event]:
    found = [event for piece in pieces for event in parse.push(piece)]
    return joined([*found, *parse.finish()])


def cut(text: str, at: list[int]) -> list[str]:
    return [text[a:b] for a, b in itertools.pairwise([0, *sorted(at), len(text)])]


@pytest.mark.parametrize(("format", "thinking", "text", "content", "calls"), RECORDED, ids=range(len(RECORDED)))
def test_recorded_answers(
    format: ToolFormat, thinking: bool, text: str, content: str | None, calls: list[tuple[str, str]]
) -> None:
    parse = parser(format, thinking)
    answer = whole(events(parse, [text]))
    assert [(call.name, call.arguments) for call in answer.calls] == calls
    assert answer.content == (text if not calls and content is None else content)
    assert parse.calls == len(calls)


def test_ten_thousand_chunkings_give_the_same_events() -> None:
    draw = random.Random(8)
    made = 0
    for format, thinking, text, _, _ in RECORDED:
        expected = events(parser(format, thinking), [text])
        assert events(parser(format, thinking), list(text)) == expected
        for _ in range(10_000 // len(RECORDED) + 1):
            pieces = cut(text, [draw.randrange(len(text) + 1) for _ in range(draw.randrange(1, 14))])
            assert events(parser(format, thinking), pieces) == expected, pieces
            made += 1
    assert made >= 10_000


PIECES = [
    *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "```json", "```"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁calls▁end｜>", "\n```json\n"),
    *("<|START_ACTION|>", "<|END_ACTION|>", "Action:", "<|tool_call|>", "<|/tool_call|>", "functools[", "function"),
    *('{"name": "f", "arguments": {"a": 1}}', '{"name": "g", "parameters": {}}', "f", "g ", "abc123XYZ"),
    *("{", "}", "[", "]", ",", ";", ":", '"', "\\", " ", "\n", "1", "-", ".", "e", "t", "true", "null", "\x00", "é"),
    *("\\u00", "<think>", "</think>"),
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.booleans(),
    st.booleans(),
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=24).map("".join),
    st.data(),
)
def test_any_text_cut_in_any_way(
    format: ToolFormat, thinking: bool, parallel: bool, text: str, data: st.DataObject
) -> None:
    expected = events(parser(format, thinking, parallel), [text])
    at = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    assert events(parser(format, thinking, parallel), cut(text, at)) == expected
    if not any(isinstance(event, CallStart) for event in expected) and not thinking:
        assert expected == ([Content(text)] if text else [])  # nothing is lost
    starts = [event.index for event in expected if isinstance(event, CallStart)]
    assert starts == list(range(len(starts)))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.dictionaries(st.text(), VALUES, max_size=4), min_size=1, max_size=3),
    st.booleans(),
    st.integers(1, 9),
)
def test_any_arguments_come_out_as_they_went_in(
    format: ToolFormat, arguments: list[dict[str, object]], ascii_only: bool, step: int
) -> None:
    texts = [json.dumps(value, ensure_ascii=ascii_only) for value in arguments]
    if format is GENERIC:
        answer = json.dumps([{"name": "f", "arguments": value} for value in arguments], ensure_ascii=ascii_only)
    else:
        calls = [format.head.replace("NAME", "f") + text + format.tail for text in texts]
        answer = format.before + (format.between or "").join(calls) + format.after
    found = whole(events(parser(format), [answer[i : i + step] for i in range(0, len(answer), step)]))
    assert [call.arguments for call in found.calls] == texts
    assert found.content is None


def test_arguments_stream_while_they_come() -> None:
    parse = parser(HERMES)
    assert parse.push('<tool_call>{"name": "f", "arg') == []
    assert parse.push('uments": {"a": "Os') == [CallStart(0, "id0", "f"), CallArguments(0, '{"a": "Os')]
    assert parse.push("lo") == [CallArguments(0, "lo")]
    assert parse.push('"}}</tool_call>') == [CallArguments(0, '"}')]
    assert parse.finish() == []


def test_text_streams_but_for_what_may_become_a_call() -> None:
    parse = parser(HERMES)
    assert parse.push("Hello <tool") == [Content("Hello")]
    assert parse.push("s> ") == [Content(" <tools>")]
    assert parse.finish() == [Content(" ")]


def test_one_call_only() -> None:
    parse = parser(HERMES, parallel=False)
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    found = parse.push(call)
    assert parse.done
    assert whole([*found, *parse.push(call + "text"), *parse.finish()]).calls == [Call("id0", "f", "{}")]


def test_the_beginning_of_another_forced_call_is_no_content() -> None:
    text = '<tool_call>{"name": "f"}</tool_call>\n<tool_call>\n{"name": "g", "argu'
    for forced, content in ((True, None), (False, '<tool_call>\n{"name": "g", "argu')):
        parse = AnswerParser(None, ToolParser(HERMES, NAMES, forced=forced))
        answer = whole([*parse.push(text), *parse.finish()])
        assert (answer.content, len(answer.calls)) == (content, 1)


def test_ids() -> None:
    def ids(format: ToolFormat, answer: str) -> list[str]:
        parse = AnswerParser(None, ToolParser(format, NAMES))
        return [call.id for call in whole([*parse.push(answer), *parse.finish()]).calls]

    first, second = ids(HERMES, '<tool_call>{"name": "f"}{"name": "f"}')
    assert first.startswith("call_")
    assert first != second
    (short,) = ids(MISTRAL, '[TOOL_CALLS][{"name": "f"}]')
    assert len(short) == 9
    assert short.isalnum()
    assert ids(MISTRAL_ARGS, "[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{}") == ["abcDEF123"]


@pytest.mark.parametrize(
    ("unit", "step"),
    [("x", 3), *itertools.product(["x", '\\"', "\\u00e9", "\n", "<tool_call>", "{["], [1000, 10**9])],
)
def test_a_megabyte_of_arguments_takes_linear_time(unit: str, step: int) -> None:
    def seconds(size: int) -> float:
        text = '<tool_call>{"name": "f", "arguments": {"a": "' + unit * (size // len(unit)) + '"}}</tool_call>'
        pieces = [text[i : i + step] for i in range(0, len(text), step)]
        parse = parser(HERMES)
        began = time.process_time()
        found = [event for piece in pieces for event in parse.push(piece)] + parse.finish()
        took = time.process_time() - began
        assert len(json.loads(whole(found).calls[0].arguments)["a"]) >= size // len(unit)
        return took

    assert seconds(1_000_000) < 3 + 12 * seconds(100_000)


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 90_000,
        '<tool_call>{"arguments": {"a": "' + "<tool_call>{" * 80_000,
        "<tool_call>{" * 80_000,
        '<tool_call>{"x": ' + "[" * 1_000_000,
        '<tool_call>{"x": ' + "1" * 1_000_000,
        " \n" * 500_000,
        "<tool_cal" * 100_000,
        '<tool_call>{"name": "' + "f" * 1_000_000,
    ],
    ids=range(8),
)
def test_a_megabyte_that_is_no_call_takes_linear_time_and_is_content(text: str) -> None:
    began = time.process_time()
    assert events(parser(HERMES), [text[i : i + 5] for i in range(0, len(text), 5)]) == [Content(text)]
    assert time.process_time() - began < 8


def test_what_is_held_is_bounded() -> None:
    parse = parser(HERMES)
    found: list[Event] = []
    for _ in range(MAX_HELD // 1000 + 2):
        found += parse.push('<tool_call>{"x": "' if not found and _ == 0 else "y" * 1000)
    assert found, "an object that never names a tool has to be let go"
