"""Conversations with tools as templates want them, through real templates; and one whole round trip."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from penstock.text.answer import AnswerParser, whole
from penstock.text.chat_template import ChatTemplate
from penstock.text.tools import conversation, plan_tools

from .chat_templates import ALL, CHATML, GEMMA, HERMES, LLAMA3, MISTRAL, PHI4, QWEN3, QWEN25
from .made import BYTE_LEVEL

ARGUMENTS = {"city": "Ås", "n": [1, None]}
CALL = {"id": "abcDEF123", "type": "function", "function": {"name": "get", "arguments": json.dumps(ARGUMENTS)}}
# As OpenAI's clients send it back.
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "Weather"}, {"type": "text", "text": " in Ås?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
    {"role": "tool", "tool_call_id": "abcDEF123", "content": "4 °C"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "get", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    },
    {"type": "function", "function": {"name": "go"}},
]


@pytest.fixture
def made() -> Iterator[Callable[[str], ChatTemplate]]:
    templates: list[ChatTemplate] = []

    def make(source: str) -> ChatTemplate:
        templates.append(ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}))
        return templates[-1]

    yield make
    for template in templates:
        template.close()


def prompt(template: ChatTemplate, talk: list[dict[str, Any]], tools: Any = TOOLS, choice: Any = None) -> str:
    plan = plan_tools(tools, choice, template)
    before = copy.deepcopy(talk)
    messages = conversation(talk, plan, template)
    assert talk == before
    return template.render(messages, tools=None if plan is None else plan.template_tools)


@pytest.mark.parametrize(
    ("source", "call", "result"),
    [
        (QWEN25, '<tool_call>\n{"name": "get", "arguments": {"city": "Ås", "n": [1, null]}}\n</tool_call>', "4 °C"),
        (QWEN3, '<tool_call>\n{"name": "get", "arguments": {"city": "Ås", "n": [1, null]}}\n</tool_call>', "4 °C"),
        (HERMES, '{"name": "get", "arguments": {"city": "Ås", "n": [1, null]}}', '{"name": "get", "content": 4 °C}'),
        (LLAMA3, '{"name": "get", "parameters": {"city": "Ås", "n": [1, null]}}', "ipython<|end_header_id|>"),
        (
            MISTRAL,
            '[TOOL_CALLS][{"name": "get", "arguments": {"city": "Ås", "n": [1, null]}, "id": "abcDEF123"}]',
            '[TOOL_RESULTS]{"content": 4 °C, "call_id": "abcDEF123"}',
        ),
    ],
    ids=["qwen2.5", "qwen3", "hermes", "llama3", "mistral"],
)
def test_calls_and_results_reach_templates_that_know_them(
    source: str, call: str, result: str, made: Callable[[str], ChatTemplate]
) -> None:
    text = prompt(made(source), TALK)
    assert call in text
    assert result in text
    assert "Weather in Ås?" in text
    assert '"go"' in text or "go(" in text
    assert "None" not in text


def test_what_a_template_writes_is_what_the_parser_reads(made: Callable[[str], ChatTemplate]) -> None:
    for source in (QWEN25, QWEN3, HERMES, LLAMA3, MISTRAL):
        template = made(source)
        plan = plan_tools(TOOLS, None, template)
        assert plan is not None
        before = template.render(conversation(TALK[:1], plan, template), tools=plan.template_tools)
        after = template.render(conversation(TALK[:2], plan, template), tools=plan.template_tools)
        said = after.removeprefix(before).replace("<think>\n\n</think>\n\n", "")
        for end in ("<|im_end|>", "<|eot_id|>", "</s>"):
            said = said.split(end)[0]
        parse = AnswerParser(None, plan.parser())
        answer = whole([*parse.push(said), *parse.finish()])
        assert answer.content is None, said
        assert [(call.name, json.loads(call.arguments)) for call in answer.calls] == [("get", ARGUMENTS)]


def test_a_template_that_takes_tools_from_the_system_message(made: Callable[[str], ChatTemplate]) -> None:
    text = prompt(made(PHI4), TALK)
    assert text.startswith('<|system|><|tool|>[{"name": "get", "description": "", "parameters": {"type": "object"')
    call = '<|tool_call|>[{"name": "get", "arguments": {"city": "Ås", "n": [1, null]}}]<|/tool_call|>'
    assert f"<|assistant|>{call}<|end|><|tool|>4 °C<|end|><|assistant|>" in text
    asked = [{"role": "system", "content": "Be brief."}, *TALK[:1]]
    assert prompt(made(PHI4), asked).startswith("<|system|>Be brief.<|tool|>[")
    assert "<|tool|>" not in prompt(made(PHI4), asked, tools=None)


def test_templates_without_tools_are_told_in_words(made: Callable[[str], ChatTemplate]) -> None:
    for source in (CHATML, GEMMA):  # one with a system message, one that refuses it and insists on turns
        text = prompt(made(source), [*TALK, {"role": "user", "content": "Thanks"}])
        assert '{"name": "get", "description": "", "parameters": {"type": "object"' in text
        assert "answer with JSON and nothing else" in text
        assert '[{"name": "get", "arguments": {"city": "Ås", "n": [1, null]}}]' in text
        assert "Result of get:\n4 °C\n\nThanks" in text
    system = [{"role": "system", "content": "Be brief."}, *TALK[:1]]
    text = prompt(made(CHATML), system, choice="required")
    assert "Be brief.\n\nYou can call these functions:" in text
    assert "Your answer has to be such a call." in text


def test_without_tools_nothing_is_said_but_calls_stay(made: Callable[[str], ChatTemplate]) -> None:
    for tools, choice in ((None, None), ([], None), (TOOLS, "none")):
        text = prompt(made(CHATML), TALK, tools, choice)
        assert "call these functions" not in text
        assert "Result of get:\n4 °C" in text
        assert "<tools>" not in prompt(made(QWEN25), TALK, tools, choice)


def test_a_named_function_is_the_only_one_shown(made: Callable[[str], ChatTemplate]) -> None:
    template = made(QWEN25)
    plan = plan_tools(TOOLS, {"type": "function", "function": {"name": "go"}}, template)
    assert plan is not None
    assert plan.template_tools is not None
    assert [tool["function"]["name"] for tool in plan.template_tools] == ["go"]
    some = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "go"}]}
    auto = plan_tools(TOOLS, some, template)
    assert auto is not None
    assert auto.template_tools == plan.template_tools
    assert auto.grammar(BYTE_LEVEL, None, False) is None
    spec = plan.grammar(BYTE_LEVEL, None, False)
    assert spec is not None
    assert spec.kind == "lark"
    assert "call_1" not in spec.value


def test_the_clients_own_words_about_tools(made: Callable[[str], ChatTemplate]) -> None:
    for source in (QWEN25, CHATML):
        template = made(source)
        plan = plan_tools(TOOLS, None, template, tool_prompt="Use them wisely.")
        text = template.render(conversation(TALK[:1], plan, template), tools=plan.template_tools if plan else None)
        assert "Use them wisely." in text
        assert "answer with JSON" not in text


def test_an_empty_content_is_none_only_where_templates_ask(made: Callable[[str], ChatTemplate]) -> None:
    assert conversation(TALK, None, made(QWEN25))[1]["content"] == ""
    asks = "<tool_call>{{ tools }}{% for m in messages %}{{ 'N' if m['content'] is none }}{% endfor %}"
    assert made(asks).render(conversation(TALK, None, made(asks))) == "<tool_call>NoneN"


def test_details(made: Callable[[str], ChatTemplate]) -> None:
    template = made(QWEN3)
    broken = {"id": "x", "type": "function", "function": {"name": "get", "arguments": '{"city": "Å'}}
    talk: list[dict[str, Any]] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": "", "tool_calls": [broken], "reasoning": "Hm."},
        {"role": "assistant", "content": "x", "tool_calls": []},
        {"role": "tool", "tool_call_id": "y", "content": None},
    ]
    system, cut, plain, result = conversation(talk, None, template)
    assert system == {"role": "system", "content": "Be brief."}
    assert cut["tool_calls"][0]["function"]["arguments"] == '{"city": "Å'
    assert cut["reasoning_content"] == cut["thinking"] == "Hm."
    assert "tool_calls" not in plain
    assert result == {"role": "tool", "tool_call_id": "y", "content": ""}
    kept = conversation(talk[:1], None, made(CHATML + "{# developer #}"))
    assert kept[0]["role"] == "developer"
    parts = made("{% for m in messages %}{% for p in m['content'] %}[{{ p.text }}]{% endfor %}{% endfor %}")
    assert parts.render(conversation(TALK[:1], None, parts)) == "[Weather in Ås?]"


def test_every_family_takes_a_conversation_with_tools(made: Callable[[str], ChatTemplate]) -> None:
    for name, source in ALL.items():
        if name == "odds":  # it cuts its messages short
            continue
        text = prompt(
            made(source), [*TALK, {"role": "assistant", "content": "Cold."}, {"role": "user", "content": "?"}]
        )
        assert "4 °C" in text, name
        assert "Weather" in text, name
