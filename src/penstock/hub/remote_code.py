"""Python code that comes with a model: where a configuration names it, and when it may run.

It runs only when its user says so (`--trust-remote-code`) and has said which code: a folder here, or one commit of the
hub. A branch's code can change between two starts; a commit's can not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    todo: list[tuple[str, Any]] = [("", config)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, Mapping):
            if value.get("auto_map"):
                return f"{path}auto_map"
            todo.extend((f"{path}{str(k)[:40]}.", v) for k, v in value.items())
        elif isinstance(value, list):
            todo.extend((f"{path}{i}.", v) for i, v in enumerate(value))
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
