"""Which way a model is loaded: by us where a family describes it and it fits, else through transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from penstock.devices import cuda
from penstock.engine.config import EngineConfig
from penstock.engine.load import Clock, LoadedModel, load_decoder
from penstock.engine.load_fallback import load_transformers
from penstock.engine.messages import Stage
from penstock.hub.config import read_config
from penstock.models.encoder_decoder.config import encodes
from penstock.models.families import describe_vision, is_described
from penstock.models.tensors import CPU
from penstock.plan.memory import WeightsTooLarge, human


def runs_ahead(config: EngineConfig) -> bool:
    """Whether a GPU computes the model a step ahead of the host: our own decoder, of text alone. All others compute
    there a step at a time."""
    folder = Path(config.model_path)
    return not encodes(folder) and is_described(read_config(folder)) and describe_vision(folder) is None


def open_model(config: EngineConfig, on_stage: Callable[[Stage], None], device: torch.device = CPU) -> LoadedModel:
    """Everything between the command and the first step, each stage reported when it is done.

    device: where it will compute, a step at a time. Raises PenstockError of the fitting kind.
    """
    clock = Clock(on_stage)
    folder = Path(config.model_path)
    if device.type != "cpu":
        clock.done("device", f"{cuda.describe(device)}, {human(cuda.free_and_total(device)[0])} free")
        cuda.require_formats(config.quantize, config.kv_cache_dtype, device)
    encoder = encodes(folder)
    if not encoder and not is_described(read_config(folder)):
        return load_transformers(config, clock, "no description of ours", device=device)
    try:
        return load_decoder(config, clock, device)
    except WeightsTooLarge as error:
        ours = config.quantize not in ("none", "bf16") or config.adapters or config.rope_scaling  # what only we can do
        if config.dummy_weights or ours or encoder or describe_vision(folder) is not None:
            raise
        return load_transformers(config, clock, "too large for the memory", error, device)
