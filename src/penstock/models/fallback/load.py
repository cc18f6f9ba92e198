"""Weights into a model of transformers, and where they lie when they do not fit."""

from __future__ import annotations

import atexit
import importlib.util
import logging
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from penstock.errors import EnvironmentFault, ModelError
from penstock.models.fallback.config import Found, words_of
from penstock.models.tensors import CPU

Room = dict[int | str, int]  # bytes that weights may take, by accelerate's names of devices: 0, 1 ..., cpu


def make(found: Found, dtype: torch.dtype, device: torch.device = CPU) -> tuple[Any, dict[str, int]]:
    """The model with random weights, and where they lie, as `load` has it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(found.settings, dtype=dtype, trust_remote_code=found.own_code)
    return model.to(device).eval(), _places(model, device)


def load(
    found: Found, dtype: torch.dtype, room: Room | None, offload_folder: str | None, device: torch.device = CPU
) -> tuple[Any, dict[str, int]]:
    """The model with the checkpoint's weights, and how many bytes of them lie where: a device's name, cpu, or disk.

    room: None for all of them on `device`; else accelerate fills the devices in order, and what is left stays on
    disk and is read anew whenever it is needed, from the checkpoint itself where it has the right form, else from a
    copy in `offload_folder` (None: in the cache), which goes with the process. Raises ModelError, EnvironmentFault.
    """
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {}
    if room is not None:
        require_accelerate()
        logging.getLogger("accelerate").setLevel(logging.ERROR)  # we say ourselves what lies where
        copies = _folder_of_copies(offload_folder)
        options = {"device_map": "auto", "max_memory": room, "offload_folder": copies}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            str(found.folder),
            config=found.settings,
            dtype=dtype,
            trust_remote_code=found.own_code,
            local_files_only=True,
            use_safetensors=True,
            experts_implementation="eager",  # the others take certain sizes only
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # somebody else's code, on somebody's checkpoint
        raise ModelError(f"transformers cannot load the model in {found.folder}", words_of(error)) from error
    finally:
        if room is not None and not os.listdir(copies):
            os.rmdir(copies)
    wrong = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    if wrong:
        raise ModelError(
            f"The checkpoint in {found.folder} does not fit its config.json.",
            f"{len(wrong)} tensors are missing or of another shape: {', '.join(wrong)[:200]}",
            "Download the model again, or copy the whole folder again.",
        )
    if room is None:
        model.to(device)
    return model, _places(model, device)


def place_of(device: torch.device) -> str:
    """What lies on a device, by the names of `load`."""
    return "cpu" if device.type == "cpu" else f"GPU {device.index or 0}"


def require_accelerate() -> None:
    """Raises EnvironmentFault where accelerate is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise EnvironmentFault(
            "The model does not fit the memory, and the package that places it on several devices is missing.",
            "",
            "pip install accelerate",
        )


def _places(model: Any, device: torch.device) -> dict[str, int]:
    """Bytes of weights by where they lie: where accelerate put them, else all on `device`."""
    everywhere = "cpu" if device.type == "cpu" else device.index or 0
    placed: dict[str, Any] = getattr(model, "hf_device_map", None) or {"": everywhere}
    parts = sorted(placed, key=len, reverse=True)
    bytes_at: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        part = next((part for part in parts if part == "" or name == part or name.startswith(f"{part}.")), "")
        place = placed.get(part, "cpu")
        bytes_at[f"GPU {place}" if isinstance(place, int) else str(place)] += weight.numel() * weight.element_size()
    return dict(bytes_at)


def _folder_of_copies(asked: str | None) -> str:
    """A new folder for weights that must be written in another form; it goes when the process ends."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "penstock"
    parent = Path(asked).expanduser() if asked is not None else cache
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix="offload-", dir=parent)
    except OSError as error:
        raise EnvironmentFault(
            f"{parent} cannot hold the weights that do not fit the memory: {error.strerror}.",
            "",
            "--offload-folder DIR names another place, with room for all weights.",
        ) from None
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
