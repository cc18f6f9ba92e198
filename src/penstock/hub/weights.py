"""Where each tensor of a model lies, whatever kind of file holds it."""

from __future__ import annotations

from pathlib import Path

from penstock.hub.checkpoint import TensorEntry, read_checkpoint
from penstock.hub.gguf.file import read_gguf
from penstock.hub.gguf.link import linked_files
from penstock.hub.gguf.tensors import entries_of


def read_weights(folder: Path) -> dict[str, TensorEntry]:
    """Every tensor of the model in `folder`, by its Hugging Face name; headers only. Raises ModelError."""
    files = linked_files(folder)
    return read_checkpoint(folder) if files is None else entries_of(read_gguf(files[0]))
