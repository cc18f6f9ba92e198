"""Hostile templates: nothing is executed, nothing is told, each ends soon, and the next rendering works."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from penstock.text.chat_template import ChatTemplate, TemplateFailure
from penstock.text.render_child import render
from penstock.text.sandbox import Sandbox

TALK = [{"role": "user", "content": "x"}]
SLOW = "{% set r = range(99999) %}"
OPEN = "open('/tmp/penstock-was-here', 'w')"

# Ways to Python's insides. Each would do something that an audit hook sees, or show something of ours.
INJECTIONS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__']['__mro__'][1]['__subclasses__']() }}",
    "{{ ''|attr('__class__')|attr('__mro__')|last|attr('__subclasses__')() }}",
    "{{ ()|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ [].__class__.__base__.__subclasses__()[100]('id', shell=true) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os.system('id') }}",
    "{{ namespace.__init__.__globals__.os.system('id') }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ lipsum.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__']['__import__']('os').system('id') }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ range.__self__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ dict.mro() }}",
    "{{ dict(__class__=1).__class__.__init__ }}",
    "{{ (1).__class__.__bases__ }}",
    "{{ messages.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages[0].clear() }}",
    "{{ messages.__getitem__.__self__.__class__ }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages[0] | attr('__class__') | string + 1 }}",
    "{{ messages | map('attr', '__class__') | list }}",
    "{{ ['x'] | map('format', 1).__class__ }}",
    "{{ '%s' % ''.__class__ }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{0.__class__.__mro__}' | format('') }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ ('{0.__cla' ~ 'ss__}').format(1) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "{{ [''] | map('string') | map(attribute='format') | first }}",
    "{% set x = namespace() %}{% set x.__class__ = 1 %}{{ x.__class__.__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('id') }}",
    "{% from '/etc/passwd' import x %}",
    "{% extends '/etc/passwd' %}",
    "{{ config.items() }}{{ request.application.__globals__ }}",
    "{{ get_flashed_messages.__globals__ }}{{ url_for.__globals__ }}",
    "{{ __import__('os').system('id') }}",
    "{{ eval('1+1') }}{{ exec('x') }}{{ " + OPEN + " }}",
    "{{ loop.__class__ }}{% for a in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}{{ m._func.__globals__ }}{{ m._environment }}",
    "{{ ().__class__.__bases__[0].__subclasses__() | selectattr('__name__', 'equalto', 'Popen') | list }}",
    "{{ (messages | groupby('role'))[0].__class__.__new__.__globals__ }}",
    "{{ cycler('a').next.__func__.__globals__ }}",
    "{% set g = (x for x in [1]) %}{{ g.gi_frame.f_globals }}",
    "{{ (messages | select).gi_frame.f_globals }}{{ (messages | select).gi_code }}",
    "{{ environment.globals }}{{ context.eval_ctx }}{{ self._TemplateReference__context }}",
    "{{ penstock_watch }}{{ messages | penstock_watch | attr('gi_frame') }}",
    "{{ ''.encode('idna').decode.__self__.__class__ }}{{ 'x'.join.__self__.__class__.__mro__ }}",
]

# What takes time or memory without end.
GREEDY = [
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a' * 1000000000 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% for i in range(1000000000) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    SLOW + "{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
    SLOW + "{% for i in r %}{% for j in r if j < 0 %}{% endfor %}{% endfor %}",
    SLOW + "{% for i in r recursive %}{{ loop(r) if loop.depth < 9 }}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
    "{% for i in range(90000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "{% for i in range(100000) %}{{ messages[0].content * 1000 }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ 1 // 0 }}",
    "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a + a %}" * 40 + "{{ a | length }}",
    "{% set a = 'aaaaaaaaaa' %}" + "{% set a = a ~ a %}" * 40 + "{{ a | length }}",
    "{% set a = 10 %}" + "{% set a = a * a %}" * 40 + "{{ a }}",
    "{% set a = 10 %}" + "{% set a = a ** 60 %}" * 9 + "{{ a }}",
    "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a | tojson }}",
    "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a == a }}{{ a }}",
    "{{ 'a'.ljust(1000000000) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a' | indent(1000000000, true) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{w}}'.format(1, w=1000000000) }}",
    "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) | length }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000) | length }}",
    "{{ ('\\t' * 1000000).expandtabs(9999) | length }}",
    "{{ ('\\n' * 1000000) | indent(9999, true) | length }}",
    SLOW + "{{ ('a' * 1000000).join(r | map('string')) | length }}",
    SLOW + "{{ r | map('string') | map('center', 9999) | list | length }}",
    SLOW + "{{ r | map('list') | list | length }}{{ r | map('string') | map('list') | sum(start=[]) | length }}",
    SLOW + "{{ (r | list * 10) | sort(reverse=true) | unique | list | length }}",
    SLOW + "{{ r | map('string') | join('a' * 99999) }}",
    "{{ ('x@' * 400000) | urlize | length }}{{ ('<!-- ' * 200000) | striptags | length }}",
    "{{ ('a ' * 400000) | wordwrap(1) | length }}{{ ('ab' * 400000) | title | wordcount }}",
    "{{ '{' * 500000 }}{{ ('{0}' * 300000).format('a' * 1000000) | length }}",
    "{{ '%(a)s' * 200000 % {'a': 'b' * 1000000} }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "-" * 50000 + "1 }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ " + "[" * 90000,
    "{{ 1" + " + 1" * 20000 + " }}",
]  # fmt: skip


def outcome(source: str) -> str:
    """What a client would get to see."""
    try:
        template = ChatTemplate(source, {})
    except TemplateFailure as failure:
        return failure.what
    try:
        return template.render(TALK)
    except TemplateFailure as failure:
        return failure.what
    finally:
        template.close()


SECRETS = ("passwd", "root:", "uid=", "class '", "<module", "__builtins__", "Traceback", "/usr", "site-packages")


def tells_nothing(text: str) -> None:
    for word in SECRETS:
        assert word not in text, text[:300]


def seconds_for(source: str) -> tuple[str, float]:
    began = time.monotonic()
    return outcome(source), time.monotonic() - began


@pytest.fixture(scope="module")
def start_seconds() -> float:
    """What starting the process takes here; a server does it once."""
    return max(seconds_for("x")[1] for _ in range(3))


@pytest.mark.parametrize("source", GREEDY, ids=range(len(GREEDY)))
def test_greedy_templates_end_soon(source: str, start_seconds: float) -> None:
    text, took = seconds_for(source)
    assert took - start_seconds < 1.5
    tells_nothing(text)


EVENTS = ("os.", "subprocess.", "open", "import", "socket.", "ctypes.", "compile", "exec", "pty.", "shutil.")
seen: list[str] | None = None


@pytest.fixture(scope="module")
def audit() -> None:
    """Records what hostile code would do; a hook cannot be taken away again, so it sleeps."""

    def hook(event: str, _: object) -> None:
        if seen is not None and event.startswith(EVENTS):
            seen.append(event)

    sys.addaudithook(hook)


@pytest.mark.usefixtures("audit")
@pytest.mark.parametrize("source", INJECTIONS, ids=range(len(INJECTIONS)))
def test_injections_execute_nothing(source: str) -> None:
    """In this process, where the hook sees what the sandbox lets through."""
    global seen
    sandbox = Sandbox()
    try:
        template = sandbox.from_string(source)
        render(sandbox, sandbox.from_string("{{ raise_exception('x') }}"), {})  # its imports happen here
        render(sandbox, sandbox.from_string("{{ missing.x }}{{ ''.__class__.x }}"), {"messages": TALK})
    except Exception as error:
        tells_nothing(str(error))
        return
    seen = []
    try:
        reply = render(sandbox, template, {"messages": [dict(m) for m in TALK], "bos_token": "", "eos_token": ""})
    finally:
        events, seen = seen, None
    assert not [event for event in events if event not in ("compile", "exec")], events  # those two are tracebacks
    tells_nothing(reply.get("text", "") + reply.get("error", ""))
    assert not Path("/tmp/penstock-was-here").exists()  # noqa: S108


def test_injections_through_the_process() -> None:
    assert len(INJECTIONS) >= 50
    for source in INJECTIONS[::5]:
        tells_nothing(outcome(source))


def test_after_a_killed_rendering_the_next_one_works() -> None:
    kill = "{{ (range(99999) | map('string') | map('list') | sum(start=[])) | length }}"
    template = ChatTemplate({"default": "fine {{ messages[0].content }}", "kill": kill}, {})
    with pytest.raises(TemplateFailure, match="more than 1 s, or took too much memory"):
        template.render(TALK, name="kill")
    assert template.render(TALK) == "fine x"
    template.close()


def test_the_process_has_no_secrets_and_goes_with_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    template = ChatTemplate("x", {})
    (child,) = template._renderers._idle
    environ = Path(f"/proc/{child._process.pid}/environ")
    if environ.exists():
        assert b"hf_secret" not in environ.read_bytes()
    process = child._process
    del child, template
    assert process.wait(5) is not None
