"""Chat templates: transformers' results, and nothing that a hostile template can do."""

from __future__ import annotations

import time

import pytest

from penstock.text.chat_template import ChatTemplate, TemplateFailure

CHATML = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {%- if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nhi<|im_end|>\\n' }}{% endif %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' }}\n"
    "{% endfor %}\n"
    "{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TALK = [{"role": "user", "content": " Grüße <b> "}]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"a": [1, "<"]}}}]


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(tools: list[dict[str, object]] | None, prompt: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        conversations=[TALK],
        tools=tools,
        chat_template=CHATML,
        add_generation_prompt=prompt,
        bos_token="<s>",
        eos_token="</s>",
    )
    ours = ChatTemplate(CHATML, "<s>", "</s>").render(TALK, add_generation_prompt=prompt, tools=tools)
    assert [ours] == expected


def test_harmless_arithmetic_and_formats_pass() -> None:
    source = (
        "{{ 'a' ~ 1 ~ none }}{{ '%05d' % 7 }}{{ '%s!' | format('x') }}{{ '{:>4}'.format('z') }}{{ 'ab'.center(4) }}"
    )
    source += (
        "{{ 3 * 4 + 2 ** 5 - 7 % 4 }}{{ [1] + [2] }}{{ 'ab' * 2 }}{{ 'x' | indent(2, true) }}{{ 'q' | center(3) }}"
    )
    text = ChatTemplate(source, None, None).render(TALK)
    assert text == "a1None00007x!   z ab 41[1, 2]abab  x q "


def test_loop_controls_generation_blocks_and_time() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') }}{{ nothing }}"
    )
    text = ChatTemplate(source, None, None).render([*TALK, *TALK])
    assert text == " Grüße <b> " + time.strftime("%Y")


def test_the_assistants_unfinished_message_is_continued() -> None:
    talk = [*TALK, {"role": "assistant", "content": "assistant says: "}]
    text = ChatTemplate(CHATML, "<s>", "</s>").render(talk)
    assert text.endswith("<|im_start|>assistant\nassistant says:")


def test_raise_exception_reaches_the_client_with_its_line() -> None:
    template = ChatTemplate("a\n{{ raise_exception('roles must alternate') }}", None, None)
    with pytest.raises(TemplateFailure) as caught:
        template.render(TALK)
    assert caught.value.what == "syntax error: roles must alternate (in <string>:2)"


def test_a_template_that_does_not_compile() -> None:
    with pytest.raises(TemplateFailure, match="syntax error"):
        ChatTemplate("{% if %}", None, None)


HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ '%s' % ''.__class__ }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a' * 1000000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
    "{% for i in range(90000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include '/etc/passwd' %}",
    "{{ 1 // 0 }}",
    "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a + a %}" * 40 + "{{ a | length }}",
    "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a ~ a %}" * 40 + "{{ a | length }}",
    "{% set a = 10 %}" + "{% set a = a * a %}" * 40 + "{{ a }}",
    "{% set a = 10 %}" + "{% set a = a ** 60 %}" * 9 + "{{ a }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a' | indent(1000000000, true) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "{{ lipsum.__globals__ }}",
    "{{ messages | map(attribute='__class__') | list }}{{ messages[0] | attr('__class__') | string + 1 }}",
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_end_soon_and_tell_nothing(source: str) -> None:
    began = time.monotonic()
    try:
        text = ChatTemplate(source, None, None).render([{"role": "user", "content": "x"}])
    except TemplateFailure as failure:
        text = failure.what
    assert time.monotonic() - began < 1.5
    assert "passwd" not in text
    assert "uid=" not in text
    assert "class '" not in text
    assert "0x" not in text
