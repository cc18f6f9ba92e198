"""One page of description a family: how its config.json reads, where its tensors lie.

Every module of this folder has a table FAMILIES, model_type -> Family; adding a family is adding a module.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from penstock.errors import ModelError, UsageError
from penstock.hub.config import read_config, read_settings
from penstock.kernels.norms import ACTIVATIONS
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.family import Family
from penstock.models.reader import refuse_quantized

FAMILIES: dict[str, Family] = {}
for _module in pkgutil.iter_modules(__path__):
    FAMILIES |= importlib.import_module(f"{__name__}.{_module.name}").FAMILIES


def describe(
    folder: Path, rope_scaling: str | None = None, rope_factor: float | None = None
) -> tuple[DecoderConfig, WeightMap]:
    """Read a snapshot's config.json and generation_config.json.

    rope_scaling (linear or dynamic) and rope_factor replace the checkpoint's own, as TGI's flags of that name do.
    Raises ModelError for what is missing, malformed or of no known family.
    """
    raw = read_config(folder)
    kind = raw.get("model_type")
    if not is_described(raw):
        asked = ", ".join(map(str, raw.get("architectures") or [kind]))
        raise ModelError(
            f"unsupported architecture: {asked} (model_type {kind!r})",
            f"supported model types: {', '.join(FAMILIES)}",
        )
    refuse_quantized(raw)
    config, names = FAMILIES[str(kind)].read(raw)
    _check(config)
    if rope_scaling or rope_factor:
        config = _override_rope(config, rope_scaling or "linear", rope_factor or 1.0)
    return replace(config, eos_ids=read_eos_ids(folder, raw)), names


def is_described(raw: Mapping[str, Any]) -> bool:
    """Whether a family describes the model of this config.json."""
    kind = raw.get("model_type")
    return isinstance(kind, str) and kind in FAMILIES


def _check(config: DecoderConfig) -> None:
    """Raise ModelError for what no decoder can be."""
    if config.num_heads % config.num_kv_heads:
        raise ModelError("config.json: the number of heads must be a multiple of the number of kv heads")
    if config.activation not in ACTIVATIONS:
        raise ModelError(f"unsupported activation {config.activation!r}", f"supported: {', '.join(ACTIVATIONS)}")
    for rope in set(config.ropes):
        turned = abs(config.head_dim if rope.rotary_dim is None else rope.rotary_dim)
        if rope.kind != "none" and turned + turned % 2 > config.head_dim:
            raise ModelError(f"config.json: {turned} of the {config.head_dim} dimensions of a head cannot be rotated")
    experts = config.experts
    if experts is not None and (experts.top_k > experts.count or experts.count % experts.groups):
        raise ModelError(f"config.json: a token cannot go to {experts.top_k} of {experts.count} experts")


def _override_rope(config: DecoderConfig, kind: str, factor: float) -> DecoderConfig:
    if kind not in ("linear", "dynamic"):
        raise UsageError(f"unknown rope scaling {kind!r}", hint="--rope-scaling takes linear or dynamic")
    if not 1 <= factor <= 1e4:
        raise UsageError(f"--rope-factor {factor} is not between 1 and 10000")
    if config.rope.kind == "none":
        raise UsageError("--rope-scaling is for models with rotary positions, which this one has not")
    rope = replace(config.rope, kind=kind, factor=factor, original_max_positions=config.max_positions)
    ropes = tuple(rope if of_layer == config.rope else of_layer for of_layer in config.layer_ropes)
    return replace(config, rope=rope, layer_ropes=ropes, max_positions=int(config.max_positions * factor))


def read_eos_ids(folder: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's, else config.json's (one id or a list)."""
    for source in (read_settings(folder, "generation_config.json"), raw):
        value = source.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            return tuple(i for i in ids if isinstance(i, int))
    return ()
