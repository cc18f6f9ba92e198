"""adapter_config.json of a LoRA adapter: ranks, scales, and nothing that we do not compute.

Whatever would make the answers others than a merged model's is refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.errors import ModelError
from penstock.hub.checkpoint import parse_object
from penstock.hub.folder import read_small

CONFIG = "adapter_config.json"
MAX_CONFIG = 2**20  # bytes
# keys that, set, ask for another computation than x @ A.T @ B.T
_OTHER = (
    "use_dora", "modules_to_save", "lora_bias", "layer_replication", "trainable_token_indices", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "megatron_config",
)  # fmt: skip
# beginnings of `init_lora_weights` that change the base model's weights as well
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LITERAL = re.compile(r"[\w.\-]+")


@dataclass(frozen=True)
class AdapterSettings:
    """rank, alpha: of modules that no pattern names. ranks, alphas: by pattern. rooted: rsLoRA (Kalajdzievski 2023)."""

    rank: float
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    rooted: bool

    @classmethod
    def read(cls, folder: Path) -> AdapterSettings:
        """Raises ModelError for what is missing, damaged, or cannot be computed."""
        if not (folder / CONFIG).exists():
            hint = "Give a folder that PEFT has saved: adapter_config.json and adapter_model.safetensors."
            raise ModelError(f"{folder} is no adapter.", f"It has no {CONFIG}.", hint)
        raw = parse_object(folder / CONFIG, read_small(folder, CONFIG, MAX_CONFIG))
        _check_kind(folder, raw)
        return cls(
            rank=_number(folder, "`r`", raw.get("r")),
            alpha=_number(folder, "`lora_alpha`", raw.get("lora_alpha")),
            ranks=_patterns(folder, "rank_pattern", raw),
            alphas=_patterns(folder, "alpha_pattern", raw),
            rooted=bool(raw.get("use_rslora")),
        )

    def rank_of(self, module: str) -> float:
        """Of a module's term."""
        return _of_pattern(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """On a module's term."""
        rank = self.rank_of(module)
        return _of_pattern(self.alphas, module, self.alpha) / (math.sqrt(rank) if self.rooted else rank)


def damaged(folder: Path, why: str, file: str = CONFIG) -> ModelError:
    """The error for an adapter whose files contradict themselves or each other."""
    hint = "Copy it again, both files from one run of the training."
    return ModelError(f"The adapter {folder} cannot be used.", f"{file}: {why}.", hint)


def unsupported(folder: Path, why: str, hint: str = "Merge it into its base model with PEFT instead.") -> ModelError:
    """The error for an adapter that asks for something else than LoRA on the matrices of layers."""
    return ModelError(f"The adapter {folder} is of a kind that is not supported.", f"{why[0].upper()}{why[1:]}.", hint)


def _check_kind(folder: Path, raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise unsupported(folder, f"its peft_type is {str(kind)[:40]!r}, not LORA")
    if raw.get("bias") not in (None, "none"):
        raise unsupported(folder, f"it trains biases (bias is {str(raw['bias'])[:40]!r})")
    for key in _OTHER:
        if raw.get(key):
            raise unsupported(folder, f"it uses `{key}`")
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        hint = "Save it with `path_initial_model_for_weight_conversion`, which makes a plain adapter of it."
        raise unsupported(folder, f"its `init_lora_weights` {start[:40]!r} changes the base model's weights too", hint)


def _number(folder: Path, what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise damaged(folder, f"its {what} is {str(value)[:40]!r}")
    return value


def _patterns(folder: Path, key: str, raw: Mapping[str, Any]) -> dict[str, float]:
    """Values by pattern. A pattern is a regular expression from a stranger: one that could take for ever is refused."""
    given = raw.get(key) or {}
    if not isinstance(given, dict):
        raise damaged(folder, f"its `{key}` is no object")
    for pattern in given:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError):
            raise damaged(folder, f"its `{key}` has {pattern[:80]!r}, which is no regular expression") from None
        repeats = sum(pattern.replace("(?:", "(").count(c) for c in "*+{?")
        slow = not _LITERAL.fullmatch(pattern) and (repeats > 2 or re.search(r"\)[*+{?]", pattern))
        if len(pattern) > 500 or slow:
            raise unsupported(folder, f"the pattern {pattern[:80]!r} in its `{key}` could take very long to match")
    return {pattern: _number(folder, f"`{key}` of {pattern[:80]!r}", value) for pattern, value in given.items()}


def _of_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that a module's name ends with, as PEFT finds it."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module):
            return value
    return default
