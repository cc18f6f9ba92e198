"""One page of description a family: how its config.json reads, where its tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from penstock.errors import ModelError, UsageError
from penstock.hub.config import read_config, read_settings
from penstock.kernels.norms import ACTIVATIONS
from penstock.models.config import DecoderConfig, WeightMap
from penstock.models.families import llama, mistral, qwen


@dataclass(frozen=True)
class Family:
    """read_config turns a config.json into the decoder's description; weights says where its tensors lie."""

    read_config: Callable[[Mapping[str, Any]], DecoderConfig]
    weights: WeightMap


FAMILIES: dict[str, Family] = {
    "llama": Family(llama.read_config, WeightMap()),
    "mistral": Family(mistral.read_config, WeightMap()),
    "qwen2": Family(qwen.read_qwen2, WeightMap()),
    "qwen3": Family(qwen.read_qwen3, WeightMap()),
}


def describe(
    folder: Path, rope_scaling: str | None = None, rope_factor: float | None = None
) -> tuple[DecoderConfig, WeightMap]:
    """Read a snapshot's config.json and generation_config.json.

    rope_scaling (linear or dynamic) and rope_factor replace the checkpoint's own, as TGI's flags of that name do.
    Raises ModelError for what is missing, malformed or of no known family.
    """
    raw = read_config(folder)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        names = ", ".join(map(str, raw.get("architectures") or [kind]))
        raise ModelError(
            f"unsupported architecture: {names} (model_type {kind!r})",
            f"supported model types: {', '.join(FAMILIES)}",
        )
    if raw.get("quantization_config"):
        settings = raw["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else settings
        raise ModelError(
            f"the checkpoint is quantized ({method}), which is not supported yet",
            hint="use the unquantized checkpoint of the same model",
        )
    family = FAMILIES[kind]
    config = family.read_config(raw)
    if config.num_heads % config.num_kv_heads:
        raise ModelError("config.json: the number of heads must be a multiple of the number of kv heads")
    if config.activation not in ACTIVATIONS:
        raise ModelError(f"unsupported activation {config.activation!r}", f"supported: {', '.join(ACTIVATIONS)}")
    if rope_scaling or rope_factor:
        config = _override_rope(config, rope_scaling or "linear", rope_factor or 1.0)
    return replace(config, eos_ids=_eos_ids(folder, raw)), family.weights


def _override_rope(config: DecoderConfig, kind: str, factor: float) -> DecoderConfig:
    if kind not in ("linear", "dynamic"):
        raise UsageError(f"unknown rope scaling {kind!r}", hint="--rope-scaling takes linear or dynamic")
    if not 1 <= factor <= 1e4:
        raise UsageError(f"--rope-factor {factor} is not between 1 and 10000")
    rope = replace(config.rope, kind=kind, factor=factor, original_max_positions=config.max_positions)
    return replace(config, rope=rope, max_positions=int(config.max_positions * factor))


def _eos_ids(folder: Path, raw: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids: generation_config.json's, else config.json's (one id or a list)."""
    for source in (read_settings(folder, "generation_config.json"), raw):
        value = source.get("eos_token_id")
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            return tuple(i for i in ids if isinstance(i, int))
    return ()
