"""A conversation to a prompt, by the model's own template, in a sandbox.

The templates come with checkpoints, so they are code from strangers: they run without access to Python's
insides, with capped loops and output and a deadline of a second, on a thread of their own.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from penstock.errors import InvalidRequest

MAX_RANGE = 100_000
MAX_OUTPUT = 4 * 1024 * 1024  # characters
MAX_REPEAT = 1024 * 1024  # length of a string or list made by `*`
SECONDS = 1.0
_TEMPLATE_FILE = "<template>"  # the name jinja gives to code from a string


class TemplateFailure(InvalidRequest):
    """The conversation does not fit the template, or the template is broken.

    The text is what the client sees.
    """


class _Raised(jinja2.TemplateError):
    """`raise_exception(message)` in a template."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only holds its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Every call and look-up of a template passes here: the place for its deadline."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.deadline = 0.0
        self.globals.update(range=_range, raise_exception=_raise, strftime_now=_now)
        self.globals.pop("lipsum", None)
        self.filters["tojson"] = _tojson

    def _check(self) -> None:
        if time.monotonic() > self.deadline:
            raise _Raised(f"the template ran for more than {SECONDS:g} s")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._check()
        return super().call(__context, __obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._check()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._check()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._check()
        if operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int):
                    _cap(len(value) * count, MAX_REPEAT, "a repetition")
        if operator == "**" and isinstance(right, int | float):
            _cap(abs(right), 64, "an exponent")
        if operator == "%" and isinstance(left, str):
            raise _Raised("formatting with % is not allowed in a template")
        return super().call_binop(context, operator, left, right)


def _cap(value: float, limit: int, name: str) -> None:
    if value > limit:
        raise _Raised(f"{name} is larger than {limit}")


def _range(*args: int) -> range:
    found = range(*args)
    _cap(len(found), MAX_RANGE, "a range")
    return found


def _raise(message: object) -> NoReturn:
    raise _Raised(str(message))


def _now(pattern: str) -> str:
    return datetime.now().astimezone().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers does it: plain JSON, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatTemplate:
    """A compiled template. `render` is safe to call from several threads."""

    def __init__(self, source: str, bos_token: str | None, eos_token: str | None) -> None:
        """Raises TemplateFailure when the source does not compile."""
        self._source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._local = threading.local()  # a sandbox per thread: its deadline belongs to one rendering
        self._compiled()

    def _compiled(self) -> tuple[_Sandbox, jinja2.Template]:
        """This thread's sandbox, and the template compiled in it."""
        if not hasattr(self._local, "pair"):
            sandbox = _Sandbox()
            self._local.pair = sandbox, self._compile(sandbox)
        pair: tuple[_Sandbox, jinja2.Template] = self._local.pair
        return pair

    def _compile(self, sandbox: _Sandbox) -> jinja2.Template:
        try:
            return sandbox.from_string(self._source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateFailure(f"syntax error: {error.message} (in <string>:{error.lineno})") from error
        except RecursionError as error:
            raise TemplateFailure("syntax error: the template is nested too deeply") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. When the last message is the assistant's, the model continues it.

        `variables` are the extra template variables that the server allows. Raises TemplateFailure.
        """
        unfinished = _unfinished(messages)
        sandbox, template = self._compiled()
        sandbox.deadline = time.monotonic() + SECONDS
        text = self._run(
            lambda: template.generate(
                **dict(variables or {}),
                **self._tokens,
                messages=list(messages),
                tools=None if tools is None else list(tools),
                documents=None if documents is None else list(documents),
                add_generation_prompt=add_generation_prompt and unfinished is None,
            ),
            sandbox,
        )
        if unfinished is not None:
            end = text.rfind(unfinished)
            if end >= 0:
                text = text[: end + len(unfinished)].rstrip()
        return text

    @staticmethod
    def _run(generate: Callable[[], Any], sandbox: _Sandbox) -> str:
        parts: list[str] = []
        size = 0
        try:
            for part in generate():
                sandbox._check()
                size += len(part)
                _cap(size, MAX_OUTPUT, "the output")
                parts.append(part)
        except _Raised as error:
            raise TemplateFailure(f"syntax error: {error.message} (in <string>:{_line(error)})") from error
        except jinja2.UndefinedError as error:
            raise TemplateFailure(f"undefined value (in <string>:{_line(error)})") from error
        except jinja2.TemplateError as error:
            raise TemplateFailure(f"the template failed (in <string>:{_line(error)})") from error
        except Exception as error:  # a template can make Python raise anything; it is the request's own failure
            raise TemplateFailure(f"the template failed: {type(error).__name__}") from error
        return "".join(parts)


def _unfinished(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The last message's content when the assistant is to continue it."""
    if not messages or messages[-1].get("role") != "assistant":
        return None
    content = messages[-1].get("content")
    return content.strip() if isinstance(content, str) and content.strip() else None


def _line(error: BaseException) -> int:
    """The template's line at which an error came up."""
    line, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _TEMPLATE_FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
