"""Prompts with images of any size: their text and the number of their rows, against transformers' processors."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from penstock.engine.images import tensor_of
from penstock.vision.processors import load_processor

from .models import TINY, picture, save_vision, their_processor


@pytest.mark.parametrize("name", TINY)
def test_any_size_makes_the_prompt_that_transformers_makes(name: str, tmp_path: Path) -> None:
    folder = save_vision(tmp_path, name)
    token = TINY[name].special[0]
    ours, theirs = load_processor(folder, token), their_processor(folder, name)
    rng = random.Random(name)
    sizes = [(28, 28), (29, 28), (1, 1), (200, 3)] + [(rng.randrange(1, 250), rng.randrange(1, 250)) for _ in range(25)]
    for width, height in sizes:
        image = picture(width, height)
        text, kept = "a", True
        try:
            expected = theirs(images=[image], text=[f"a{token}b"], return_tensors="np")
        except ValueError:
            kept = False  # Qwen's processor takes no image that is 200 times as wide as high, say
        if not kept:
            with pytest.raises(ValueError, match="aspect ratio"):
                ours.prepare(image)
            continue
        arrays, words = ours.prepare(image)
        text, _ = ours.finished(f"a{words}b")
        ids = theirs.tokenizer([text], return_tensors="np", add_special_tokens="paligemma" not in name)["input_ids"]
        assert ids.tolist() == expected["input_ids"].tolist(), (width, height)
        for key, array in arrays.items():
            assert np.array_equal(tensor_of(array).numpy(), np.asarray(expected[key])), (width, height, key)
