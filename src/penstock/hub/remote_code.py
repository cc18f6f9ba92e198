"""Python code that comes with a model: where a configuration names it, and when it may run.

It runs only when its user says so (`--trust-remote-code`) and has said which code: a folder here, or one commit of the
hub. A branch's code can change between two starts; a commit's can not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from penstock.errors import ModelError
from penstock.hub.config import read_config
from penstock.hub.folder import is_plain_name, member

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CLASS = re.compile(r"(?P<module>[A-Za-z_]\w*)\.(?P<name>[A-Za-z_]\w*)", re.ASCII)
CAUSAL = "AutoModelForCausalLM"


def own_code(config: Mapping[str, Any]) -> str | None:
    """The dotted place of the first non-empty `auto_map` in a config.json, at any depth; None where there is none."""
    places = (place for place, value in _entries(config) if value and place.rpartition(".")[2] == "auto_map")
    return next(places, None)


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Everything in a config.json, at any depth, with its dotted place."""
    todo: list[tuple[str, Any]] = [("", config)]
    while todo:
        path, value = todo.pop()
        if path:
            yield path, value
        inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
        todo.extend((f"{path}.{str(key)[:40]}".lstrip("."), entry) for key, entry in inner)


def foreign_code(config: Mapping[str, Any]) -> str | None:
    """The dotted place where a config.json has transformers fetch compiled kernels from a repository; None if nowhere.

    `attn_implementation` and its like take the name of one, and what is in it runs without a question.
    """
    for place, value in _entries(config):
        if place.endswith("_implementation") or place.endswith("_implementation_internal"):
            names = list(value.values()) if isinstance(value, Mapping) else [value]
            if any(isinstance(name, str) and "/" in name for name in names):
                return place
    return None


def is_commit(revision: str | None) -> bool:
    """Whether a revision is one commit for good: 40 hexadecimal digits, not a branch or a tag."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def lacks_code(folder: Path) -> bool:
    """Whether the config.json of a folder names code, and there is no Python file."""
    return not any(folder.glob("*.py")) and own_code(read_config(folder)) is not None


def check_trusted(folder: Path, config: Mapping[str, Any], trusted: bool) -> None:
    """Raises ModelError where the model's code may not run, or is not a causal language model all in its folder."""
    place = own_code(config)
    kind = config.get("model_type")
    if not trusted:
        commit = folder.name if folder.parent.name == "snapshots" else None
        what = "--trust-remote-code" if commit is None else f"--trust-remote-code --revision {commit} (a full commit)"
        raise ModelError(
            f"The model in {folder} runs only with Python code of its own, and that is not run unasked.",
            f"Its config.json has `{place}`; neither Penstock nor transformers knows the model_type {kind!r}.",
            f"Read the .py files in the folder; if you trust their author, add {what}",
        )
    auto_map = config.get("auto_map")
    if not isinstance(auto_map, Mapping) or not {"AutoConfig", CAUSAL} <= auto_map.keys():
        raise ModelError(
            f"The model in {folder} has code, but none for a causal language model.",
            f"Its auto_map must name AutoConfig and {CAUSAL}.",
        )
    for reference in (auto_map["AutoConfig"], auto_map[CAUSAL]):
        match = _CLASS.fullmatch(reference) if isinstance(reference, str) else None
        if match is None:
            raise ModelError(
                f"The model in {folder} names code that is not in its folder: {str(reference)[:120]!r}.",
                "Code of another repository is not pinned, so it does not run.",
                "Copy the .py files into the folder and name them there.",
            )
        member(folder, f"{match['module']}.py")
    for file in folder.glob("*.py"):
        if is_plain_name(file.name):
            member(folder, file.name)  # nothing that a link brings in from elsewhere
