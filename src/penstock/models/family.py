"""A family of models: how its config.json reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from penstock.models.config import DecoderConfig, VisionConfig, WeightMap


@dataclass(frozen=True)
class Family:
    """models: what people know of it. read: a config.json -> what to compute, and where the tensors lie. sees: a
    config.json -> how it takes images, None for families that do not."""

    models: str
    read: Callable[[Mapping[str, Any]], tuple[DecoderConfig, WeightMap]]
    sees: Callable[[Mapping[str, Any]], VisionConfig] | None = None
