"""A model folder's config.json, read with suspicion: it is data from a stranger."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from penstock.errors import ModelError
from penstock.hub.checkpoint import parse_object
from penstock.hub.folder import damaged, read_small, reason

CONFIG = "config.json"
MAX_CONFIG = 8 * 1024 * 1024  # bytes; the largest honest ones (label tables) have some hundred KiB


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder.

    Raises ModelError when it is missing (saying what the folder looks like instead), damaged or huge. Code that it
    names (`auto_map`) is not run by reading it: see hub/remote_code.
    """
    names = _names(folder)
    if CONFIG not in names:
        raise _not_a_model(folder, names)
    config = parse_object(folder / CONFIG, read_small(folder, CONFIG, MAX_CONFIG))
    if not config:
        raise damaged(folder / CONFIG, "It is an empty object: it describes no model.")
    return config


def read_settings(folder: Path, name: str) -> dict[str, Any]:
    """A further JSON file of the folder (generation_config.json, say), {} when it is not there. Raises ModelError."""
    if not (folder / name).exists():
        return {}
    return parse_object(folder / name, read_small(folder, name, MAX_CONFIG))


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise ModelError(f"The model folder {folder} cannot be read.", f"{reason(error)}.") from None


def _not_a_model(folder: Path, names: list[str]) -> ModelError:
    """Why a folder without config.json is none, and what was probably meant."""
    what = f"The folder {folder} has no {CONFIG}, so it is not a model."
    if not names:
        return ModelError(what, "It is empty.", "Download the model again, or give another folder.")
    if "adapter_config.json" in names:
        return ModelError(
            what,
            "It is a LoRA adapter: a change to a model.",
            f"Give its base model: penstock serve BASE --lora-adapters NAME={folder}",
        )
    gguf = [n for n in names if n.lower().endswith(".gguf")]
    if gguf:
        return ModelError(
            what,
            f"It holds GGUF files ({gguf[0]}).",
            f"Give one of them: {folder / gguf[0]}",
        )
    if "model_index.json" in names:
        return ModelError(what, "It is a diffusers pipeline (images), not a language model.", "Give a language model.")
    if "snapshots" in names and "blobs" in names:
        org_name = folder.resolve().name.removeprefix("models--").replace("--", "/")
        return ModelError(what, "It is a model's folder in the hub cache.", f"Give its hub name instead: {org_name}")
    inside = [n for n in names if (folder / n / CONFIG).is_file()]
    if inside:
        more = f" (and {len(inside) - 1} more)" if len(inside) > 1 else ""
        return ModelError(what, f"It holds folders that are: {inside[0]}{more}.", f"Give {folder / inside[0]}")
    if any(n.endswith((".safetensors", ".bin", ".pt", ".pth")) for n in names):
        return ModelError(what, "It has weights, but their description is missing.", f"Copy {CONFIG} into it as well.")
    shown = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
    return ModelError(what, f"It holds: {shown}", "Give a folder with config.json and *.safetensors, or a hub name.")
