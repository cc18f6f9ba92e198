"""Towers: from the pixels of an image to rows that take the places of token embeddings.

Towers and projectors are transformers' own, without their language model, which is our decoder. This is the one module
of the model's side that imports transformers, and only when a model that takes images is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.errors import ModelError
from penstock.hub.checkpoint import TensorEntry
from penstock.models.config import WeightMap
from penstock.models.tensors import CPU, TensorReader

_LANGUAGE = ("language_model.", "text_model.")  # what transformers' models call the part that is ours


class VisionTower:
    """The part of a vision-language model that sees."""

    def __init__(self, model: Any, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self._model, self._dtype, self._device = model.to(device).eval(), dtype, device

    @classmethod
    def load(
        cls,
        folder: Path,
        entries: dict[str, TensorEntry] | None,
        names: WeightMap,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> VisionTower:
        """Read the tower's tensors of a checkpoint; without entries take random ones. Raises ModelError.

        names: where the decoder's tensors are; all others are the tower's. device: where it will compute.
        """
        from transformers.models.auto.configuration_auto import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_MAPPING
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)  # it would tell that the decoder is missing
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        text = config.get_text_config()
        text.num_hidden_layers, text.vocab_size, text.pad_token_id, text.tie_word_embeddings = 0, 1, None, False
        if getattr(text, "layer_types", None):
            text.layer_types = []
        kind = MODEL_MAPPING[type(config)]
        if entries is None:
            return cls(kind._from_config(config, dtype=dtype), dtype, device)
        read = TensorReader(entries, dtype)
        tensors = {name: read(name, entry.shape) for name, entry in tower_entries(entries, names).items()}
        model, found = kind.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
        missing = sorted(name for name in found["missing_keys"] if not name.startswith(_LANGUAGE))
        if missing or found["mismatched_keys"]:
            raise ModelError(
                f"the checkpoint lacks tensors of the model's vision tower, such as {missing[0]!r}"
                if missing
                else "the vision tower's tensors do not have the shapes that config.json asks for",
                "it does not fit its config.json",
                "download the model again",
            )
        return cls(model, dtype, device)

    @torch.inference_mode()
    def __call__(self, arrays: Mapping[str, Tensor]) -> Tensor:
        """What the decoder is given of one image. arrays: of transformers' image processor. [rows, hidden]"""
        given = {name: array.to(self._device) for name, array in arrays.items()}
        given = {name: array.to(self._dtype) if array.is_floating_point() else array for name, array in given.items()}
        parts = self._model.get_image_features(**given, return_dict=True).pooler_output
        rows = parts if isinstance(parts, Tensor) else torch.cat(list(parts))
        return rows.reshape(-1, rows.shape[-1]).to(self._dtype)


def tower_entries(entries: Mapping[str, TensorEntry], names: WeightMap) -> dict[str, TensorEntry]:
    """The tensors of a checkpoint that are not the decoder's."""
    names = names.found_in(entries)
    return {name: entry for name, entry in entries.items() if not name.startswith((names.base, f"{names.head}."))}
