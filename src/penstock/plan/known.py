"""Well-known models and published measurements, from data files: what can be planned where there is no hub."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

_HERE = Path(__file__).parent


class KnownModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A model's numbers. hub: its name there; also: other names of the same shape; parameters: billions, published."""

    hub: str
    parameters: float
    config: dict[str, Any]
    also: tuple[str, ...] = ()


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Output tokens a second that somebody measured. gpu: a name of hardware.toml, or `here` for this machine;
    context: tokens of a sequence on average; source: engine and place of publication."""

    model: str
    gpu: str
    tokens_per_second: float
    source: str
    cards: int = 1
    format: str = "bfloat16"
    batch: int = 1
    context: int = 128


@cache
def known_models() -> dict[str, KnownModel]:
    """Every model of the data file by its short name."""
    return msgspec.convert(tomllib.loads((_HERE / "models.toml").read_text(encoding="utf-8")), dict[str, KnownModel])


def find_known(name: str) -> tuple[str, KnownModel] | None:
    """A model by its short name, its hub name or the part of that after the slash, letter case aside."""
    wanted = name.lower()
    for short, model in known_models().items():
        names = {short, model.hub.lower(), *(other.lower() for other in model.also)}
        if wanted in names or wanted in {full.rpartition("/")[2] for full in names}:
            return short, model
    return None


@cache
def published() -> tuple[Measured, ...]:
    """Measurements of the reference literature; see the file for what was left out and why."""
    table = tomllib.loads((_HERE / "measured.toml").read_text(encoding="utf-8"))
    return msgspec.convert(table["measured"], tuple[Measured, ...])
