"""Which way a model is loaded: by us where a family describes it and it fits, else through transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from penstock.devices.cuda import choose_device
from penstock.engine.config import EngineConfig
from penstock.engine.kv_type import check_device
from penstock.engine.load import Clock, LoadedModel, load_decoder
from penstock.engine.load_fallback import load_transformers
from penstock.engine.messages import Stage
from penstock.errors import UsageError
from penstock.hub.config import read_config
from penstock.models.encoder_decoder.config import encodes
from penstock.models.families import describe_vision, is_described
from penstock.plan.memory import WeightsTooLarge


def device_of(config: EngineConfig) -> torch.device:
    """Where the model computes: on a GPU those that are our decoder, all others on the processor so far. Raises
    UsageError where another is asked for, EnvironmentFault where there is no such GPU."""
    device, folder = choose_device(config.device), Path(config.model_path)
    if device.type == "cpu":
        return device
    if not encodes(folder) and is_described(read_config(folder)) and describe_vision(folder) is None:
        check_device(config, device)
        return device
    if config.device == "auto":
        return torch.device("cpu")
    raise UsageError("this kind of model runs on the processor only, so far", hint="--device cpu, or leave it out")


def open_model(config: EngineConfig, on_stage: Callable[[Stage], None]) -> LoadedModel:
    """Everything between the command and the first step, each stage reported when it is done.

    Raises PenstockError of the fitting kind.
    """
    clock = Clock(on_stage)
    folder = Path(config.model_path)
    encoder = encodes(folder)
    if not encoder and not is_described(read_config(folder)):
        return load_transformers(config, clock, "no description of ours")
    try:
        return load_decoder(config, clock)
    except WeightsTooLarge as error:
        ours = config.quantize not in ("none", "bf16") or config.adapters or config.rope_scaling  # what only we can do
        if config.dummy_weights or ours or encoder or describe_vision(folder) is not None:
            raise
        return load_transformers(config, clock, "too large for the memory", error)
