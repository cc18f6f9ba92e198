"""The process that renders chat templates: `python -m penstock.text.render_child`, started by text/renderer.py.

A template is code from strangers. The sandbox denies it Python; this process, which has little memory, no keys in its
environment and an alarm that kills it, ends whatever the sandbox's checks cannot see.
"""

from __future__ import annotations

import resource
import signal
import sys
from contextlib import suppress
from typing import Any

import jinja2
from jinja2 import meta, nodes

from penstock.text.render_wire import COMPILE_SECONDS, GRACE, RENDER_SECONDS, receive, send
from penstock.text.sandbox import MAX_OUTPUT, Raised, Sandbox, cap

MEMORY = 512 * 1024 * 1024  # bytes of address space
_CHOOSING = ("penstock_watch", "selectattr", "rejectattr", "list")
_TEMPLATE_FILE = "<template>"  # the name jinja gives to code from a string


def main() -> None:
    """Compile the templates of the first message, then render until the other end closes."""
    _settle_in()
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    sandbox = Sandbox()
    first = receive(source)
    if first is None:
        return
    templates, found = {}, {}
    signal.setitimer(signal.ITIMER_REAL, COMPILE_SECONDS)
    for name, text in first["sources"].items():
        try:
            found[name] = examine(sandbox, text)
            templates[name] = sandbox.from_string(text)
        except jinja2.TemplateSyntaxError as error:
            found[name] = {"error": f"syntax error: {error.message} (in <string>:{error.lineno})"}
        except (RecursionError, MemoryError):
            found[name] = {"error": "syntax error: the template is nested too deeply"}
    signal.setitimer(signal.ITIMER_REAL, 0)
    send(sink, found)
    while (request := receive(source)) is not None:
        signal.setitimer(signal.ITIMER_REAL, RENDER_SECONDS + GRACE)
        reply = render(sandbox, templates[request["name"]], request["variables"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(sink, reply)


def examine(sandbox: Sandbox, source: str) -> dict[str, Any]:
    """What a template reads: its free variables, whether it goes through the parts of contents that have such, and
    whether it wants all contents so."""
    tree = sandbox.parse(source)
    loops = any(_is_content(_unfiltered(loop.iter)) for loop in tree.find_all(nodes.For))
    tests = any(test.name == "string" for test in tree.find_all(nodes.Test))
    variables = sorted(meta.find_undeclared_variables(tree))
    return {"variables": variables, "loops": loops, "parts": loops and not tests}


def render(sandbox: Sandbox, template: jinja2.Template, variables: dict[str, Any]) -> dict[str, str]:
    """{"text": ...} or {"error": ...}."""
    sandbox.start_clock()
    parts: list[str] = []
    size = 0
    try:
        for part in template.generate(variables):
            sandbox.check()
            size += len(part)
            cap(size, MAX_OUTPUT, "the output")
            parts.append(part)
    except Raised as error:
        return {"error": f"syntax error: {error.message} (in <string>:{_line(error)})"}
    except jinja2.UndefinedError as error:
        return {"error": f"undefined value (in <string>:{_line(error)})"}
    except jinja2.TemplateError as error:
        return {"error": f"the template failed (in <string>:{_line(error)})"}
    except Exception as error:  # a template can make Python raise anything; it is the request's own failure
        return {"error": f"the template failed: {type(error).__name__}"}
    return {"text": "".join(parts)}


def _is_content(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def _unfiltered(node: nodes.Node) -> nodes.Node:
    """What a loop goes over, without the sandbox's filter around it and those that choose among the parts."""
    while isinstance(node, nodes.Filter) and node.node and node.name in _CHOOSING:
        node = node.node
    return node


def _line(error: BaseException) -> int:
    """The template's line at which an error came up."""
    line, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _TEMPLATE_FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _settle_in() -> None:
    """Take little memory, write no file, start no process; end with the parent, which Ctrl-C is left to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills, also in the midst of a long operation
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_AS, MEMORY),
    ):
        with suppress(ValueError, OSError):  # not every system has each
            resource.setrlimit(limit, (value, value))


if __name__ == "__main__":
    main()
