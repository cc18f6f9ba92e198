"""Random LoRA adapters made by PEFT, and the same merged into their base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.engine.exactness import reference

SIZE = 0.05  # of the numbers in an adapter: enough to change what a tiny model says


def save_adapter(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """Write a random adapter of the model in `base` into `folder`, by PEFT; settings: of LoraConfig."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )
    adapted = get_peft_model(reference(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * SIZE)
    adapted.save_pretrained(folder)
    return folder


def merged(base: Path, adapter: Path) -> PreTrainedModel:
    """The model with an adapter in its weights, by PEFT."""
    from peft import PeftModel

    return PeftModel.from_pretrained(reference(base), adapter).merge_and_unload()


def write_adapter(folder: Path, tensors: dict[str, Tensor], **settings: Any) -> Path:
    """An adapter of given tensors, by their names behind `base_model.model.`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [], "bias": "none", **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    named = {f"base_model.model.{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return folder


def tensors_of(adapter: Path) -> dict[str, Tensor]:
    """What an adapter holds, by the names behind `base_model.model.`."""
    found = load_file(adapter / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model."): tensor for name, tensor in found.items()}
