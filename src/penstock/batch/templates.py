"""Prompts made of columns: `Translate: {text}`.

Only names in braces are understood: no attributes, no indices, no conversions, so that neither a template nor what is
filled in can reach anything but the columns. `{{` and `}}` are braces.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

import msgspec

from penstock.errors import InvalidRequest, UsageError


class PromptTemplate:
    """A template, taken apart. names: the columns it uses."""

    def __init__(self, source: str) -> None:
        """Raises UsageError."""
        self.source = source
        self._parts: list[tuple[str, str | None]] = []  # (text, column behind it)
        try:
            parts = list(string.Formatter().parse(source))
        except ValueError as error:
            raise _bad(source, f"{error}.") from None
        for text, name, spec, conversion in parts:
            if name is not None and (spec or conversion or not name or any(c in name for c in ".[]")):
                raise _bad(
                    source, f"{{{name}{'!' if conversion else ''}{':' if spec else ''}...}} is more than a name."
                )
            self._parts.append((text, name))
        self.names = frozenset(name for _, name in self._parts if name is not None)
        if not self.names:
            raise _bad(source, "It names no column, so every prompt would be the same.")

    def fill(self, columns: Mapping[str, Any]) -> str:
        """The prompt of a row. Text goes in as it is, anything else as JSON. Raises InvalidRequest."""
        out: list[str] = []
        for text, name in self._parts:
            out.append(text)
            if name is not None:
                out.append(_text(name, columns))
        return "".join(out)


def _text(name: str, columns: Mapping[str, Any]) -> str:
    value = columns.get(name)
    if isinstance(value, str):
        return value
    if value is None:
        known = ", ".join(list(columns)[:20])
        raise InvalidRequest(f"it has no {name!r}, which the template wants; it has {known or 'nothing'}")
    return msgspec.json.encode(value).decode()


def _bad(source: str, why: str) -> UsageError:
    return UsageError(
        f"The template {source[:80]!r} cannot be used.",
        why,
        "Names of columns stand in braces, as in 'Translate: {text}'; {{ and }} are braces.",
    )
