"""The TOML file of options: below the flags and the environment, above the defaults."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from penstock.errors import EnvironmentFault, UsageError


def default_config_file() -> Path:
    """Where the file is looked for when no `--config` is given."""
    base = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(base).expanduser() / "penstock" / "config.toml"


def read_config_file(given: str | None, commands: list[str]) -> dict[str, dict[str, Any]]:
    """The options of the file by command and option, in click's spelling (`max_batch_size`).

    A missing default file is an empty one; a missing `given` file is an error, and so is a key outside the tables.
    """
    file = Path(given).expanduser() if given else default_config_file()
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if given is None:
            return {}
        raise EnvironmentFault(f"The configuration file {file} does not exist.") from None
    except OSError as error:
        raise EnvironmentFault(f"The configuration file {file} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"The configuration file {file} is not TOML.", f"{error}.") from None
    options: dict[str, dict[str, Any]] = {}
    for name, table in tables.items():
        if name not in commands or not isinstance(table, dict):
            raise UsageError(
                f"The configuration file {file} has {name!r}, which is not a command.",
                f"The commands are {', '.join(commands)}.",
                "Write options under their command, for example: [generate] and below it: max-new-tokens = 64",
            )
        options[name] = _spelled(table)
    return options


def _spelled(table: dict[str, Any]) -> dict[str, Any]:
    """A table with its keys in click's spelling, and so the tables in it."""
    return {
        key.replace("-", "_"): _spelled(value) if isinstance(value, dict) else value for key, value in table.items()
    }
