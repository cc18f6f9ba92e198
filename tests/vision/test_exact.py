"""Vision-language models against transformers: tokens and logits of prompts with images, whatever the schedule."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest, Image
from penstock.text.tokenizer import load_tokenizer
from penstock.vision.reader import ImageReader
from penstock.vision.wire import RawImage
from tests.engine.driver import generate

from .models import TINY, encoded, picture, reference, save_vision, their_processor

NEW = 64
SIZES = [[(60, 40)], [(90, 31), (30, 44)], [], [(33, 120)]]  # of the images of each prompt


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Case:
    """A prompt with its images as we prepare it, and as transformers does."""

    ids: list[int]
    images: list[Image]
    theirs: dict[str, torch.Tensor]

    def request(self, number: int, **options: Any) -> EngineRequest:
        return EngineRequest(
            id=number, prompt_ids=self.ids, max_new_tokens=NEW, ignore_eos=True, images=self.images, **options
        )


@contextmanager
def reading(folder: Path, name: str) -> Iterator[ImageReader]:
    reader = ImageReader(folder, TINY[name].special[0], 2**25)
    try:
        yield reader
    finally:
        reader.close()


def cases(folder: Path, name: str, sizes: list[list[tuple[int, int]]] = SIZES) -> list[Case]:
    """Prompts with images of these sizes."""
    tokenizer, processor = load_tokenizer(folder), their_processor(folder, name)
    assert tokenizer is not None
    made = []
    with reading(folder, name) as reader:
        for n, of_prompt in enumerate(sizes):
            pictures = [picture(*size, seed=n + i) for i, size in enumerate(of_prompt)]
            pieces = ["seven wizards"] * (n % 2) + [f"{reader.inline} jumps over "] * len(pictures) + ["a lazy dog"]
            text = "".join(pieces)
            raw = [RawImage(encoded(image), "PNG") for image in pictures]
            told = reader.read(text, raw) if raw else None
            special = told is None or told.special is not False
            ids = tokenizer.encode(text if told is None else told.text, add_special_tokens=special)
            theirs = dict(
                processor(images=pictures, text=[text], return_tensors="pt")
                if pictures
                else AutoTokenizer.from_pretrained(folder)([text], return_tensors="pt")
            )
            assert theirs["input_ids"][0].tolist() == ids
            made.append(Case(ids, [] if told is None else told.images, theirs))
    return made


@torch.inference_mode()
def expected(model: PreTrainedModel, case: Case) -> list[int]:
    out = model.generate(**case.theirs, max_new_tokens=NEW, do_sample=False)
    found: list[int] = out[0, len(case.ids) :].tolist()
    return found


@pytest.mark.parametrize("name", TINY)
def test_tokens_and_logits_match_transformers(name: str, tmp_path: Path) -> None:
    """Together and alone, in chunks that cut images, with cached prefixes, preempted."""
    folder = save_vision(tmp_path, name)
    prompts = cases(folder, name)
    model = reference(folder)
    theirs = [expected(model, case) for case in prompts]
    engine = EngineLoop.load(EngineConfig(str(folder), dtype="float32"))
    requests = [case.request(n) for n, case in enumerate(prompts)]
    for _ in range(2):  # the second time with cached prefixes
        got = generate(engine, requests)
        assert [got[n].error for n in range(len(prompts))] == [None] * len(prompts)
        assert [got[n].ids for n in range(len(prompts))] == theirs
    assert engine.stats.cached_prompt_tokens > 0
    for request, ids in zip(requests, theirs, strict=True):
        assert generate(engine, [request])[request.id].ids == ids
    assert engine.stats.used_blocks == 0
