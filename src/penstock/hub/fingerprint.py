"""The identity of a model folder's content, cheap enough to take at every start."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from penstock.hub.folder import damaged, member, reason
from penstock.hub.gguf.link import linked_files

SAMPLES = 64  # places in each weights file
SAMPLE_BYTES = 4096
_WHOLE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "adapter_config.json",
)


def fingerprint(folder: Path) -> str:
    """SHA-256 (hex) over what decides the model's text: configuration, tokenizer, weights.

    Weights count by size and by samples spread over each file (header included), for reading 140 GB to resume a run
    would be absurd. Training changes every part of a file, so a changed model does not pass for the same.
    """
    digest = hashlib.sha256()
    files = [
        (name, member(folder, name))
        for name in sorted(os.listdir(folder))
        if name in _WHOLE or name.endswith(".safetensors")
    ]
    files += [(file.name, file) for file in linked_files(folder) or ()]
    for name, file in files:
        try:
            with file.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                digest.update(f"{name}\0{size}\0".encode())
                if name in _WHOLE:
                    digest.update(stream.read())
                    continue
                for i in range(SAMPLES):
                    stream.seek(max(0, size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                    digest.update(stream.read(SAMPLE_BYTES))
        except OSError as error:
            raise damaged(file, f"It cannot be read: {reason(error)}.") from None
    return digest.hexdigest()
