"""Where chat templates are kept: the files of a model's folder, and a file that the user names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.errors import ModelError, UsageError

DEFAULT = "default"  # the name of a template that has no other
MAX_BYTES = 2 * 1024 * 1024
MAX_NAMED = 32  # templates of one model

_HINT = "Give a file with one jinja template, or a tokenizer_config.json that has one."


def templates_of(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The sources of a model's chat templates by name, {} where it has none. Raises ModelError.

    The first place that has any decides: chat_template.json, chat_template.jinja, tokenizer_config.json (whose content
    is `settings`), processor_config.json. additional_chat_templates/NAME.jinja add to what was found there.
    """
    try:
        found = _from_json(folder / "chat_template.json") or _jinja(folder / "chat_template.jinja", DEFAULT)
        found = found or _named(settings.get("chat_template")) or _from_json(folder / "processor_config.json")
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))[:MAX_NAMED]:
            found.setdefault(path.stem, _jinja(path, path.stem)[path.stem])
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"A chat template in {folder} cannot be read.", _first_line(error)) from error
    return found


def read_template_file(path: Path) -> dict[str, str]:
    """The templates of a file that the user named: jinja, or JSON with `chat_template`. Raises UsageError."""
    try:
        if path.suffix == ".json":
            found = _from_json(path, must=True)
        else:
            found = _jinja(path, DEFAULT, must=True)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"The chat template {path} cannot be read.", _first_line(error), _HINT) from error
    if not any(source.strip() for source in found.values()):
        raise UsageError(f"There is no chat template in {path}.", "", _HINT)
    return found


def _jinja(path: Path, name: str, must: bool = False) -> dict[str, str]:
    return {name: _text(path)} if must or path.is_file() else {}


def _from_json(path: Path, must: bool = False) -> dict[str, str]:
    if not must and not path.is_file():
        return {}
    value = json.loads(_text(path))
    return _named(value.get("chat_template")) if isinstance(value, dict) else {}


def _named(value: object) -> dict[str, str]:
    """One template, or several: a list of `{"name", "template"}` or an object of names."""
    if isinstance(value, str):
        return {DEFAULT: value}
    if isinstance(value, list):
        pairs = [(entry.get("name"), entry.get("template")) for entry in value if isinstance(entry, dict)]
    else:
        pairs = list(value.items()) if isinstance(value, dict) else []
    return {name: text for name, text in pairs[:MAX_NAMED] if isinstance(name, str) and isinstance(text, str)}


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_BYTES} bytes")
    return data.decode("utf-8")


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
