"""The catalogue: short names for models, with what one wants to know before fetching them.

Three TOML files, a later one winning: the package's own, the site's ($PENSTOCK_CATALOGUE, several with `:` between),
the user's (~/.config/penstock/models.toml). Each is a table a model:

    ["llama-3.1-8b-instruct"]                    # quotes where there is a dot
    model = "meta-llama/Llama-3.1-8B-Instruct"   # or a folder, absolute, or a GGUF file
    family = "llama"
    parameters = 8.03                            # billions
    license = "Llama 3.1 Community License"
    gated = true
    resources = "1 GPU of 24 GB"                 # left out: derived from the parameters
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import msgspec

from penstock.errors import EnvironmentFault, UsageError

GB = 10**9
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}", re.ASCII)
_OWN = Path(__file__).with_name("models.toml")
_CARDS = (16, 24, 40, 48, 80)  # GB of common GPUs


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One model. model: a hub name, an absolute folder or a GGUF file; parameters: billions, 0 where unknown."""

    model: str
    family: str = ""
    parameters: float = 0.0
    license: str = ""
    gated: bool = False
    revision: str | None = None
    resources: str = ""
    note: str = ""
    name: str = ""

    def memory(self, weight_bytes: float) -> int:
        """Bytes of the weights when each takes so many."""
        return int(self.parameters * 1e9 * weight_bytes)

    def recommended(self) -> str:
        """What to ask a cluster for: the catalogue's own words, else the GPUs that hold the weights in 16 bits with a
        quarter more for the cache and the work."""
        if self.resources or not self.parameters:
            return self.resources
        need = self.memory(2) * 1.25 / GB
        for card in _CARDS:
            if need <= card:
                return f"1 GPU of {card} GB, or {need:.0f} GB of memory"
        count = 2
        while need > count * 80:
            count *= 2
        return f"{count} GPUs of 80 GB, or {need:.0f} GB of memory"


def files() -> list[Path]:
    """The catalogue's files, the later winning; the user's only where it exists."""
    site = [Path(part).expanduser() for part in os.environ.get("PENSTOCK_CATALOGUE", "").split(os.pathsep) if part]
    user = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "penstock" / "models.toml"
    return [_OWN, *site, *([user] if user.is_file() else [])]


def entries() -> list[Entry]:
    """Every model of the catalogue, by name. Raises UsageError, EnvironmentFault naming the file and the entry."""
    found: dict[str, Entry] = {}
    for file in files():
        found |= _read(file)
    return [found[name] for name in sorted(found, key=str.lower)]


def find(name: str) -> Entry | None:
    """The entry of a name, letter case aside; None where there is none."""
    if not _NAME.fullmatch(name):
        return None
    return next((entry for entry in entries() if entry.name.lower() == name.lower()), None)


def _read(file: Path) -> dict[str, Entry]:
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EnvironmentFault(
            f"The catalogue {file} cannot be read: {error.strerror}.", "", "PENSTOCK_CATALOGUE names such files."
        ) from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"The catalogue {file} is not TOML.", f"{error}.") from None
    return {name: _entry(file, name, table) for name, table in tables.items()}


def _entry(file: Path, name: str, table: object) -> Entry:
    example = '[my-model], and below it: model = "ORG/NAME" or model = "/folder"'
    if not _NAME.fullmatch(name) or name == "demo":
        raise UsageError(f"The catalogue {file} has the impossible name {name[:80]!r}.", "", f"For example: {example}")
    try:
        entry = msgspec.convert(table, Entry)
    except msgspec.ValidationError as error:
        why = str(error).replace("`", "'")
        raise UsageError(f"The catalogue {file} has a bad entry {name!r}.", f"{why}.", f"Write {example}") from None
    if not _is_model(entry.model) or not 0 <= entry.parameters < 1e6:
        raise UsageError(f"The catalogue {file} has a bad entry {name!r}.", "", f"Write {example}")
    return msgspec.structs.replace(entry, name=name)


def _is_model(model: str) -> bool:
    """A hub name or an absolute path, so that no entry leads to another entry."""
    return model == "demo" or os.path.isabs(os.path.expanduser(model)) or model.count("/") == 1
