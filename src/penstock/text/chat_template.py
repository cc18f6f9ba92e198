"""A conversation to a prompt, by the model's own template.

The templates come with checkpoints, so they are code from strangers: they run in a sandbox, with a second to finish.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2

from penstock.errors import InvalidRequest
from penstock.text.sandbox import MAX_OUTPUT, SECONDS, Raised, Sandbox, cap

_TEMPLATE_FILE = "<template>"  # the name jinja gives to code from a string


class TemplateFailure(InvalidRequest):
    """The conversation does not fit the template, or the template is broken. Clients see the text."""


class ChatTemplate:
    """A compiled template. `render` is safe to call from several threads."""

    def __init__(self, source: str, bos_token: str | None, eos_token: str | None) -> None:
        """Raises TemplateFailure when the source does not compile."""
        self._source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._local = threading.local()  # a sandbox per thread: its deadline belongs to one rendering
        self._compiled()

    def _compiled(self) -> tuple[Sandbox, jinja2.Template]:
        """This thread's sandbox, and the template compiled in it."""
        if not hasattr(self._local, "pair"):
            sandbox = Sandbox()
            self._local.pair = sandbox, self._compile(sandbox)
        pair: tuple[Sandbox, jinja2.Template] = self._local.pair
        return pair

    def _compile(self, sandbox: Sandbox) -> jinja2.Template:
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
    def _run(generate: Callable[[], Any], sandbox: Sandbox) -> str:
        parts: list[str] = []
        size = 0
        try:
            for part in generate():
                sandbox.check()
                size += len(part)
                cap(size, MAX_OUTPUT, "the output")
                parts.append(part)
        except Raised as error:
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
