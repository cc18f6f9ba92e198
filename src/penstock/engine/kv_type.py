"""How the KV cache keeps its numbers (--kv-cache-dtype): which types a device has, and what a token takes in them."""

from __future__ import annotations

from typing import Protocol

import torch

from penstock.engine.config import EngineConfig
from penstock.errors import UsageError
from penstock.kernels.byte_cache import SCALE

_BYTES = "int8"  # on processors; devices/cuda.py has those of GPUs


class Vectors(Protocol):
    """What counts here of a model's description."""

    @property
    def kv_elements(self) -> int: ...
    @property
    def kv_vectors(self) -> int: ...


def check_device(config: EngineConfig, device: torch.device) -> None:
    """Raises UsageError for a cache that a GPU does not have."""
    if config.kv_cache_dtype == _BYTES and device.type != "cpu":
        raise UsageError(
            "an int8 KV cache is for processors", hint="--kv-cache-dtype fp8_e4m3fn takes as few bytes on a GPU"
        )


def refuse(config: EngineConfig, why: str) -> None:
    """Raises UsageError where bytes are asked for and the model has no such cache."""
    if config.kv_cache_dtype == _BYTES:
        raise UsageError(f"--kv-cache-dtype int8: {why}", hint="leave it out")


def kv_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """The type of the cache on a processor. dtype: what is computed in."""
    return torch.int8 if config.kv_cache_dtype == _BYTES else dtype


def kv_bytes(shape: Vectors, dtype: torch.dtype) -> int:
    """Bytes that one token takes in a cache of this type, scales included."""
    return shape.kv_elements * dtype.itemsize + (SCALE * shape.kv_vectors if dtype == torch.int8 else 0)


def kv_in_words(config: EngineConfig, device: torch.device) -> str:
    """What the start-up line says of the option where a model computes a step at a time."""
    if config.kv_cache_dtype is None:
        return ""
    if device.type != "cpu":
        return "; --kv-cache-dtype is for decoders of text, and has no effect"
    if config.kv_cache_dtype == _BYTES:
        return ", in int8 with a scale for each token and head (--kv-cache-dtype)"
    return f"; --kv-cache-dtype {config.kv_cache_dtype} is for GPUs and has no effect, int8 takes as few bytes here"
