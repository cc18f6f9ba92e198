"""The bundled demo model, and the recipe that made it."""

import pathlib


def model_path() -> pathlib.Path:
    """The folder of the demo model: weights, tokenizer, chat template, model card, held-out text."""
    return pathlib.Path(__file__).parent / "model"
