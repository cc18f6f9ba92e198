"""The counts of a model that planning needs, and how numbers are read from a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.errors import ModelError


@dataclass(frozen=True)
class Shape:
    """Counts of parameters, by how a step uses them.

    embedding: tables of which a token reads one row; matrices: what a token is multiplied with in the layers, experts
    included; active: the part of `matrices` that one token multiplies when decoding; head: the output matrix, also
    when it is the embedding (tied); other: norms, biases, routers, and towers for images.
    kv_width: numbers that one layer's cache keeps of a token; windows: tokens that each layer's cache keeps, None: all.
    steps: layers that a decoding step goes through. exact: False for a family that the table lacks. kv_dtype: of the
    cache's numbers, None: the type that is computed in.
    """

    family: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    embedding: int
    matrices: int
    active: int
    head: int
    tied: bool
    other: int
    kv_width: int
    windows: tuple[int | None, ...]
    experts: int = 0
    chosen: int = 0
    exact: bool = True
    kv_dtype: str | None = None

    @property
    def parameters(self) -> int:
        """Everything that a checkpoint stores, a tied head once."""
        return self.embedding + self.matrices + self.other + (0 if self.tied else self.head)

    def kv_values(self, tokens: int) -> int:
        """Numbers in the cache of one sequence of so many tokens."""
        return self.kv_width * sum(tokens if window is None else min(tokens, window) for window in self.windows)


class Numbers:
    """Look-ups in a config.json under its several spellings."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    def number(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self.raw.get(name)
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**40:
                    raise ModelError(f"config.json: `{name}` must be a whole number, not {str(value)[:40]}.")
                return value
        if default is None:
            raise ModelError(f"config.json lacks `{names[0]}`, so this model cannot be planned.")
        return default

    def flag(self, rule: bool | str, default: bool = False) -> bool:
        """A fixed yes or no, or the name of the config's own flag (`name=yes` for one that is set by default)."""
        if isinstance(rule, bool):
            return rule
        name, _, preset = rule.partition("=")
        value = self.raw.get(name)
        return (preset == "yes" or default) if value is None else bool(value)
