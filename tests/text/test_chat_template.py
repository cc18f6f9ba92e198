"""Chat templates: transformers' results for templates of every family."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jinja2
import pytest

from penstock.errors import ModelError, UsageError
from penstock.text.chat_template import ChatTemplate, TemplateFailure
from penstock.text.template_files import read_template_file, templates_of
from penstock.text.tokenizer import load_tokenizer

from .chat_templates import ALL, CHATML, COMMAND_R, HERMES, LLAMA3, MISTRAL, PHI4, QWEN3
from .made import BYTE_LEVEL

TALK: list[dict[str, Any]] = [{"role": "user", "content": " Grüße <b> "}]
CALL = {"id": "abcDEF123", "type": "function", "function": {"name": "get", "arguments": {"größe": [1, "<"], "b": None}}}
TALKS: dict[str, list[dict[str, Any]]] = {
    "question": TALK,
    "system": [{"role": "system", "content": "Be brief.\n"}, *TALK],
    "turns": [*TALK, {"role": "assistant", "content": "Hello 'you'\n"}, {"role": "user", "content": "1 < 2?"}],
    "bad turns": [*TALK, *TALK],
    "call": [*TALK, {"role": "assistant", "content": None, "tool_calls": [CALL]}],
    "result": [
        {"role": "system", "content": "Be brief."},
        *TALK,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcDEF123", "name": "get", "content": '{"a": "ü"}'},
    ],
    "two results": [
        *TALK,
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "abcDEF123", "name": "get", "content": "1"},
        {"role": "tool", "tool_call_id": "abcDEF123", "name": "get", "content": "2"},
        {"role": "assistant", "content": "<think>\nSo.\n</think>\n\nThree."},
        {"role": "user", "content": "Sure?"},
    ],
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get",
            "description": 'Gets "größe" & more',
            "parameters": {
                "type": "object",
                "properties": {"größe": {"type": "array", "items": {"type": "integer"}}, "b": {"type": "string"}},
                "required": ["größe"],
            },
        },
    },
    {
        "type": "function",
        "function": {"name": "go", "description": "", "parameters": {"type": "object", "properties": {}}},
    },
]


@pytest.fixture
def made() -> Iterator[Callable[..., ChatTemplate]]:
    """Makes templates that end with the test."""
    templates: list[ChatTemplate] = []

    def make(source: str | dict[str, str], **tokens: str | list[str]) -> ChatTemplate:
        templates.append(ChatTemplate(source, tokens or {"bos_token": "<s>", "eos_token": "</s>"}))
        return templates[-1]

    yield make
    for template in templates:
        template.close()


def reference(source: str, talk: list[dict[str, Any]], **options: Any) -> str | None:
    """What transformers makes of it; None where the template refuses."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        found, _ = render_jinja_template([talk], chat_template=source, bos_token="<s>", eos_token="</s>", **options)
    except (jinja2.TemplateError, TypeError):
        return None
    return str(found[0])


@pytest.mark.parametrize("name", ALL)
def test_equals_transformers(name: str, made: Callable[..., ChatTemplate]) -> None:
    template = made(ALL[name])
    rendered = 0
    for talk in TALKS.values():
        for tools in (None, TOOLS):
            for prompt in (True, False):
                expected = reference(ALL[name], talk, tools=tools, add_generation_prompt=prompt)
                try:
                    ours = template.render(talk, tools, add_generation_prompt=prompt, continue_final_message=False)
                except TemplateFailure:
                    assert expected is None
                    continue
                assert ours == expected
                rendered += 1
    assert rendered >= 8


@pytest.mark.parametrize("thinking", [True, False, None])
def test_variables_reach_the_template(thinking: bool | None, made: Callable[..., ChatTemplate]) -> None:
    variables = {} if thinking is None else {"enable_thinking": thinking}
    ours = made(QWEN3).render(TALK, variables={**variables, "unknown": 1})
    assert ours == reference(QWEN3, TALK, add_generation_prompt=True, **variables)
    assert ours.endswith("</think>\n\n") == (thinking is False)


@pytest.mark.parametrize(
    "name", ["messages", "tools", "chat_template", "tokenize", "bos_token", "a b", "_x", "__class__"]
)
def test_variables_that_a_request_cannot_set(name: str, made: Callable[..., ChatTemplate]) -> None:
    with pytest.raises(TemplateFailure, match="chat_template_kwargs"):
        made(CHATML).render(TALK, variables={name: True})


def test_documents(made: Callable[..., ChatTemplate]) -> None:
    documents = [{"title": "A", "text": "x"}, {"title": "B", "text": "y"}]
    ours = made(COMMAND_R).render(TALK, documents=documents)
    assert ours == reference(COMMAND_R, TALK, documents=documents, add_generation_prompt=True)
    assert "Document: 1\ntitle: B" in ours


@pytest.mark.parametrize("end", ["so", "so ", "so\n\n"])
@pytest.mark.parametrize("name", ["chatml", "llama3", "mistral", "gemma", "phi"])
def test_continue_final_message_as_transformers(name: str, end: str, made: Callable[..., ChatTemplate]) -> None:
    talk = [*TALK, {"role": "assistant", "content": f"so, so and {end}"}]
    ours = made(ALL[name]).render(talk, add_generation_prompt=False, continue_final_message=True)
    assert ours == reference(ALL[name], talk, continue_final_message=True)


def test_continue_final_message_of_parts(made: Callable[..., ChatTemplate]) -> None:
    source = "{% for m in messages %}{% for p in m.content %}<{{ p.text }}>{% endfor %}{% endfor %}"
    talk = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    template = made(source)
    assert template.render(talk, add_generation_prompt=False, continue_final_message=True) == "<a><b"
    assert template.wants_parts
    assert not made(CHATML).wants_parts


def test_what_cannot_be_continued(made: Callable[..., ChatTemplate]) -> None:
    with pytest.raises(TemplateFailure, match="needs a last message with text"):
        made(CHATML).render([], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(TemplateFailure, match="drops the last message"):
        made("x").render(TALK, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(TemplateFailure, match="exclude each other"):
        made(CHATML).render(TALK, continue_final_message=True)


def test_the_assistants_unfinished_message_is_continued_as_in_tgi(made: Callable[..., ChatTemplate]) -> None:
    talk = [*TALK, {"role": "assistant", "content": "assistant says: "}]
    template = made(CHATML)
    assert template.render(talk).endswith("<|im_start|>assistant\nassistant says:")
    assert template.render(talk, continue_final_message=False).endswith("<|im_start|>assistant\n")


def test_named_templates(made: Callable[..., ChatTemplate]) -> None:
    template = made({"default": "d", "tool_use": "t", "rag": "r", "x": "{{ tools | length }}"})
    assert template.render(TALK) == "d"
    assert template.render(TALK, TOOLS) == "t"
    assert template.render(TALK, documents=[{"title": "A"}]) == "r"
    assert template.render(TALK, TOOLS, name="x") == "2"
    assert made({"default": "d"}).render(TALK, TOOLS) == "d"
    with pytest.raises(TemplateFailure, match="no template 'y'; it has 'default', 'tool_use', 'rag', 'x'"):
        template.render(TALK, name="y")


def test_named_templates_as_transformers(tmp_path: Path, made: Callable[..., ChatTemplate]) -> None:
    from transformers import PreTrainedTokenizerFast

    BYTE_LEVEL.backend.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(HERMES)
    theirs = PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = load_tokenizer(tmp_path)
    assert ours is not None
    template = made(ours.chat_templates, **ours.template_tokens)
    for tools in (None, TOOLS):
        for talk in (TALKS["question"], TALKS["turns"]):
            expected = theirs.apply_chat_template(talk, tools=tools, tokenize=False, add_generation_prompt=True)
            assert template.render(talk, tools) == expected


def test_special_tokens_by_their_names_as_transformers(tmp_path: Path, made: Callable[..., ChatTemplate]) -> None:
    from transformers import PreTrainedTokenizerFast

    names = ("pad_token", "sep_token", "cls_token", "unk_token", "mask_token", "image_token")
    shown = "|".join(f"{{{{ {name} }}}}" for name in ("bos_token", *names))
    BYTE_LEVEL.backend.save(str(tmp_path / "tokenizer.json"))
    settings: dict[str, Any] = {name: f"<{name}>" for name in names}
    settings |= {"pad_token": "<pad>", "extra_special_tokens": ["<a>", "<b>"], "add_bos_token": True}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(shown)
    ours = load_tokenizer(tmp_path)
    assert ours is not None
    text = made(ours.chat_templates, **ours.template_tokens).render(TALK)
    assert text == PreTrainedTokenizerFast.from_pretrained(str(tmp_path)).apply_chat_template(TALK, tokenize=False)
    assert text == "|<pad>|<sep_token>|<cls_token>|<unk_token>|<mask_token>|<image_token>"
    listed = made("{{ additional_special_tokens | join(',') }}{{ pad_token is defined }}", **ours.template_tokens)
    assert listed.render(TALK) == "<a>,<b>True"
    assert made("{{ pad_token is defined }}").render(TALK) == "False"


def test_where_templates_are_looked_for(tmp_path: Path) -> None:
    assert templates_of(tmp_path, {}) == {}
    (tmp_path / "processor_config.json").write_text('{"chat_template": "processor"}')
    assert templates_of(tmp_path, {}) == {"default": "processor"}
    listed = [{"name": "default", "template": "config"}, {"name": "rag", "template": "r"}, {"name": 3}]
    assert templates_of(tmp_path, {"chat_template": listed}) == {"default": "config", "rag": "r"}
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert templates_of(tmp_path, {"chat_template": listed}) == {"default": "jinja"}
    (tmp_path / "chat_template.json").write_text('{"chat_template": {"default": "json", "x": "y"}}')
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("more")
    assert templates_of(tmp_path, {}) == {"default": "json", "x": "y", "rag": "more"}
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        templates_of(tmp_path, {})


def test_a_file_that_the_user_names(tmp_path: Path) -> None:
    jinja, config, empty = tmp_path / "t.jinja", tmp_path / "tokenizer_config.json", tmp_path / "e.jinja"
    jinja.write_text("j")
    config.write_text('{"chat_template": "c"}')
    empty.write_text("\n")
    assert read_template_file(jinja) == {"default": "j"}
    assert read_template_file(config) == {"default": "c"}
    with pytest.raises(UsageError, match="There is no chat template in"):
        read_template_file(empty)
    for bad in (tmp_path / "none.jinja", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            read_template_file(bad)
    config.write_text("[]")
    with pytest.raises(UsageError, match="There is no chat template in"):
        read_template_file(config)


def test_harmless_arithmetic_and_formats_pass(made: Callable[..., ChatTemplate]) -> None:
    source = (
        "{{ 'a' ~ 1 ~ none }}{{ '%05d' % 7 }}{{ '%s!' | format('x') }}{{ '{:>4}'.format('z') }}{{ 'ab'.center(4) }}"
    )
    source += (
        "{{ 3 * 4 + 2 ** 5 - 7 % 4 }}{{ [1] + [2] }}{{ 'ab' * 2 }}{{ 'x' | indent(2, true) }}{{ 'q' | center(3) }}"
    )
    assert made(source).render(TALK) == "a1None00007x!   z ab 41[1, 2]abab  x q "


def test_loop_controls_generation_blocks_and_time(made: Callable[..., ChatTemplate]) -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') }}{{ nothing }}"
    )
    assert made(source).render([*TALK, *TALK]) == " Grüße <b> " + time.strftime("%Y")


def test_raise_exception_reaches_the_client_with_its_line(made: Callable[..., ChatTemplate]) -> None:
    with pytest.raises(TemplateFailure) as caught:
        made("a\n{{ raise_exception('roles must alternate') }}").render(TALK)
    assert caught.value.what == "syntax error: roles must alternate (in <string>:2)"


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(TemplateFailure, match="syntax error"):
        ChatTemplate("{% if %}", {})
    with pytest.raises(TemplateFailure, match="syntax error"):
        ChatTemplate({"default": "fine", "rag": "{% for %}"}, {})


def test_the_format_of_calls_and_the_think_tags(made: Callable[..., ChatTemplate]) -> None:
    named = {name: made(source).tool_format.name for name, source in ALL.items()}
    assert named == dict.fromkeys(ALL, "generic") | {
        "llama3": "llama3", "qwen2.5": "hermes", "qwen3": "hermes", "hermes": "hermes", "mistral": "mistral",
        "command-r": "cohere-action",
    }  # fmt: skip
    assert made(MISTRAL.replace("[TOOL_CALLS][", "[TOOL_CALLS]x[ARGS]")).tool_format.name == "mistral-args"
    assert made({"default": CHATML, "tool_use": LLAMA3}).tool_format.name == "llama3"
    deepseek = "{{ tools }}{{ '<｜tool▁calls▁begin｜>' }}"
    assert made(deepseek).tool_format.name == "deepseek-v3.1"
    assert made(deepseek + "```json").tool_format.name == "deepseek"
    unaware = made("{{ messages }}{{ '<｜tool▁calls▁begin｜>' }}").tool_format
    assert (unaware.name, unaware.native, unaware.bare) == ("deepseek-v3.1", False, True)
    assert made("{{ tools }}<|START_ACTION|>").tool_format.name == "cohere"
    assert made("{{ tools }}Action: [{'tool_name'").tool_format.name == "cohere-action"
    assert made("{{ tools }}functools[").tool_format.name == "functools"
    assert made(PHI4).tool_format.name == "phi4"
    tags = made(QWEN3).think_tags
    assert tags is not None
    assert tags.close == "</think>"
    assert made(CHATML).think_tags is None


def test_many_threads_at_once_and_soon(made: Callable[..., ChatTemplate]) -> None:
    template = made(QWEN3)
    expected = template.render(TALKS["result"], TOOLS)
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: template.render(TALKS["result"], TOOLS), range(200))) == {expected}
    began = time.perf_counter()
    for _ in range(100):
        template.render(TALKS["result"], TOOLS)
    assert time.perf_counter() - began < 1.0  # 10 ms each; about 0.2 ms where nothing else runs
