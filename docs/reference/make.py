"""Writes python-api.md from the docstrings: `python docs/reference/make.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

from penstock import LLM, Farm, PenstockError, Result, farm
from penstock.batch.llm import Asked
from penstock.batch.parameters import Parameters
from penstock.batch.results import Sample

TARGET = Path(__file__).with_name("python-api.md")
METHODS = ("generate", "chat", "each", "embed", "load_adapter", "unload_adapter", "close")
FARM_METHODS = ("status", "wait", "results", "merge", "stats", "run", "resume", "cancel")


def page() -> str:
    """The whole page."""
    parts = [
        "# Python API",
        "Made from the docstrings by `python docs/reference/make.py`. "
        "How to use it: [Penstock in Python](../how-to/python.md).",
        _described("penstock.LLM", LLM, _signature(LLM.__init__)),
        *(_described(f"LLM.{name}", getattr(LLM, name), _signature(getattr(LLM, name))) for name in METHODS),
        _described("penstock.farm", farm, _signature(farm)),
        _described("penstock.Farm", Farm, _signature(Farm.__init__)),
        *(_described(f"Farm.{name}", getattr(Farm, name), _signature(getattr(Farm, name))) for name in FARM_METHODS),
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
    for parameter in found.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "    *," not in lines:
            lines.append("    *,")
        stars = "**" if parameter.kind is parameter.VAR_KEYWORD else ""
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"    {stars}{parameter.name}: {parameter.annotation}{default},")
    name = function.__qualname__.partition(".")[0] if function.__name__ == "__init__" else function.__name__
    returns = "" if found.return_annotation == "None" else f" -> {found.return_annotation}"
    return f"{name}(\n" + "\n".join(lines) + f"\n){returns}" if lines else f"{name}(){returns}"


def _fields(kind: type, names: list[str]) -> str:
    hints = inspect.get_annotations(kind)
    return "\n".join(f"{name}: {hints[name]}" for name in names)


if __name__ == "__main__":
    TARGET.write_text(page())
