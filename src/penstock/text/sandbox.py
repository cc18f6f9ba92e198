"""A jinja environment for templates from strangers: no way to Python's insides, and caps on everything."""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from penstock.text.render_wire import RENDER_SECONDS

MAX_RANGE = 100_000
MAX_OUTPUT = 4 * 1024 * 1024  # characters
MAX_MADE = 1024 * 1024  # length of a string or list made by `*`
MAX_WIDTH = 10_000  # of padding and in formats
MAX_BITS = 4096  # of a number
_WIDTH = re.compile(r"[1-9]\d{4}")


class Raised(jinja2.TemplateError):
    """`raise_exception(message)` in a template."""


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only holds its body."""

    tags = {"generation"}  # noqa: RUF012 (jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Joins(NodeTransformer):
    """Turns `a ~ b` into a filter of ours, so that its result can be capped like every other."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "penstock_join", [], [], None, None, lineno=node.lineno)


class _Watched(NodeTransformer):
    """Every round of a loop looks at the clock: loops can be all that a template does."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "penstock_watch", [], [], None, None, lineno=node.lineno)
        return node


class Sandbox(ImmutableSandboxedEnvironment):
    """Every call, look-up and operation of a template passes here: the place for its deadline and its caps."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.deadline = 0.0  # on the monotonic clock
        self.globals.update(range=_range, raise_exception=_raise, strftime_now=_now)
        self.globals.pop("lipsum", None)
        self.filters.update(tojson=_tojson, penstock_join=_join, penstock_watch=self._watch, format=_format)
        for name in ("center", "indent", "batch", "slice", "truncate", "wordwrap"):
            self.filters[name] = _capped(self.filters[name])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        joined: nodes.Template = _Joins().visit(super()._parse(source, name, filename))
        template: nodes.Template = _Watched().visit(joined)
        return template

    def start_clock(self) -> None:
        """A rendering begins: it has so many seconds."""
        self.deadline = time.monotonic() + RENDER_SECONDS

    def _watch(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.check()
            yield item

    def check(self) -> None:
        """Raises Raised when the time is up."""
        if time.monotonic() > self.deadline:
            raise Raised(f"the template ran for more than {RENDER_SECONDS:g} s")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.check()
        if isinstance(getattr(__obj, "__self__", None), str | bytes):
            _cap_numbers(args, kwargs)  # ljust, zfill, format ...
            _cap_width(__obj.__self__)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """jinja's stand-in for str.format hides the string that it formats from `call`: its widths are capped here."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def call(*args: Any, **kwargs: Any) -> str:
            _cap_numbers(args, kwargs)
            _cap_width(value.__self__)
            return wrapped(*args, **kwargs)

        return call

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.check()
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            cap(bits, MAX_BITS, "a number")
        elif operator == "*":
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(count, int):
                    cap(len(value) * count, MAX_MADE, "a repetition")
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            cap(len(left) + len(right), MAX_OUTPUT, "a sum")
        elif operator == "%" and isinstance(left, str):
            _cap_width(left)
        return super().call_binop(context, operator, left, right)


def _cap_numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """No method of a string needs a large number, but several make a string of that length."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, int):
            cap(value, MAX_WIDTH, "an argument")


def _cap_width(text: str | bytes) -> None:
    """A format such as `%1000000000d` makes a string of that length."""
    digits = _WIDTH.search(text if isinstance(text, str) else text.decode("latin-1"))
    if digits and ("%" in str(text) or "{" in str(text)):
        raise Raised("a width in a format is too large")


def _capped(filter_: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(filter_)  # keeps jinja's marks for filters that want the environment
    def call(*args: Any, **kwargs: Any) -> Any:
        _cap_numbers(args, kwargs)
        return filter_(*args, **kwargs)

    return call


def _format(value: object, *args: Any, **kwargs: Any) -> str:
    """jinja's filter `format`, with its widths capped."""
    text = str(value)
    _cap_width(text)
    return text % (kwargs or args)


def _join(values: Sequence[object]) -> str:
    parts = [str(value) for value in values]
    cap(sum(map(len, parts)), MAX_OUTPUT, "a text")
    return "".join(parts)


def cap(value: float, limit: int, name: str) -> None:
    if value > limit:
        raise Raised(f"{name} is larger than {limit}")


def _range(*args: int) -> range:
    found = range(*args)
    cap(len(found), MAX_RANGE, "a range")
    return found


def _raise(message: object) -> NoReturn:
    raise Raised(str(message))


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)  # without a zone, as in transformers


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers does it: plain JSON, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
