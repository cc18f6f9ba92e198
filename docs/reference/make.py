"""Writes python-api.md from the docstrings: `python docs/reference/make.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

from penstock import LLM, PenstockError, Result
from penstock.batch.llm import Asked
from penstock.batch.parameters import Parameters
from penstock.batch.results import Sample

TARGET = Path(__file__).with_name("python-api.md")
METHODS = ("generate", "chat", "each", "embed", "close")


def page() -> str:
    """The whole page."""
    parts = [
        "# Python API",
        "Made from the docstrings by `python docs/reference/make.py`. "
        "How to use it: [Penstock in Python](../how-to/python.md).",
        _described("penstock.LLM", LLM, _signature(LLM.__init__)),
        *(_described(f"LLM.{name}", getattr(LLM, name), _signature(getattr(LLM, name))) for name in METHODS),
        _described("Parameters", Parameters, _fields(Parameters, list(get_type_hints(Asked)))),
        _described("penstock.Result", Result, _fields(Result, list(Result.__struct_fields__))),
        _described("Sample", Sample, _fields(Sample, list(Sample.__struct_fields__))),
        _described("penstock.PenstockError", PenstockError, ""),
    ]
    return "\n\n".join(parts) + "\n"


def _described(name: str, thing: object, spelled: str) -> str:
    code = f"\n\n```python\n{spelled}\n```" if spelled else ""
    text = re.sub(r"((?:^(?:>>>|\.\.\.) .*\n)+)", r"```pycon\n\1```\n", inspect.getdoc(thing) or "", flags=re.MULTILINE)
    return f"## {name}{code}\n\n{text}"


def _signature(function: Callable[..., object]) -> str:
    """The parameters, a line each."""
    found = inspect.signature(function)
    lines: list[str] = []
    for parameter in list(found.parameters.values())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"    {stars}{parameter.name}: {parameter.annotation}{default},")
    name = "LLM" if function.__name__ == "__init__" else function.__name__
    returns = "" if found.return_annotation == "None" else f" -> {found.return_annotation}"
    return f"{name}(\n" + "\n".join(lines) + f"\n){returns}" if lines else f"{name}(){returns}"


def _fields(kind: type, names: list[str]) -> str:
    hints = inspect.get_annotations(kind)
    return "\n".join(f"{name}: {hints[name]}" for name in names)


if __name__ == "__main__":
    TARGET.write_text(page())
