"""A GGUF file as a model folder: its metadata becomes the JSON files that every model has, its tensors stay in it.

The folder lies in Penstock's cache and is made once for each state of the file. Whatever reads a model (config,
tokenizer, template, engine) therefore reads this one like any other; only the checkpoint reader follows the link.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from penstock.errors import EnvironmentFault
from penstock.hub.folder import reason
from penstock.hub.gguf.config import config_of, generation_config_of
from penstock.hub.gguf.file import parts_of, read_gguf
from penstock.hub.gguf.link import LINK, cache_folder
from penstock.hub.gguf.tensors import entries_of
from penstock.hub.gguf.tokenizer import settings_of, tokenizer_of

_LAYOUT = 1  # of what is written; a change makes all folders anew


def unpacked(path: Path) -> Path:
    """The model folder of the GGUF file `path`, made if it is not there. Raises ModelError, EnvironmentFault."""
    files = [file.resolve() for file in parts_of(path.absolute())]
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    name = hashlib.sha256(json.dumps([_LAYOUT, states]).encode()).hexdigest()[:32]
    folder = cache_folder() / name
    if (folder / LINK).is_file():
        return folder
    model = read_gguf(path.absolute())
    config = config_of(model)
    entries_of(model)
    tokenizer = tokenizer_of(model)
    contents = {
        "config.json": config,
        "generation_config.json": generation_config_of(model),
        "tokenizer_config.json": settings_of(model, config["max_position_embeddings"]),
        LINK: {"files": [str(file) for file in model.files]},
    }
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder.parent))
        try:
            if tokenizer is not None:
                tokenizer.save(str(part / "tokenizer.json"))
            for file, content in contents.items():
                (part / file).write_text(json.dumps(content), encoding="utf-8")
            os.rename(part, folder)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            if not (folder / LINK).is_file():  # somebody else may have been faster
                raise
    except OSError as error:
        raise EnvironmentFault(
            f"The folder {folder.parent} cannot be written: {reason(error)}.",
            "The tokenizer and the configuration of a GGUF file are unpacked there.",
            "Free some space, or set PENSTOCK_CACHE to a folder that can be written.",
        ) from None
    return folder
