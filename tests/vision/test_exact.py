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
from penstock.vision.wire import Limits, RawImage
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
    reader = ImageReader(folder, TINY[name].special[0], Limits(2**25))
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


@dataclass(frozen=True)
class Expected:
    """What transformers generates, and the log-probabilities of prompt and answer."""

    ids: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]


@torch.inference_mode()
def expected(model: PreTrainedModel, case: Case) -> Expected:
    out = model.generate(
        **case.theirs, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    ids = out.sequences[0, len(case.ids) :].tolist()
    answer = torch.cat(out.logits).log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1))
    prompt = model(**case.theirs).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(case.ids[1:]).unsqueeze(1))
    return Expected(ids, answer.flatten().tolist(), prompt.flatten().tolist())


def load(folder: Path, **options: Any) -> EngineLoop:
    return EngineLoop.load(EngineConfig(str(folder), dtype="float32", **options))


def answers(engine: EngineLoop, requests: list[EngineRequest]) -> list[list[int]]:
    got = generate(engine, requests)
    assert [got[request.id].error for request in requests] == [None] * len(requests)
    assert engine.stats.used_blocks == 0
    return [got[request.id].ids for request in requests]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of transformers
@pytest.mark.parametrize("name", TINY)
def test_tokens_and_logits_match_transformers(name: str, tmp_path: Path) -> None:
    """Together and alone, with cached prefixes, in chunks that cut images, preempted, in blocks of one token."""
    folder = save_vision(tmp_path, name)
    prompts = cases(folder, name)
    model = reference(folder)
    theirs = [expected(model, case) for case in prompts]
    ids = [answer.ids for answer in theirs]
    requests = [case.request(n) for n, case in enumerate(prompts)]
    engine = load(folder)
    assert answers(engine, requests) == ids
    assert answers(engine, requests) == ids
    assert engine.stats.cached_prompt_tokens > 0
    assert [answers(engine, [request])[0] for request in requests] == ids
    scored = [case.request(n, logprobs=True, prompt_logprobs=True) for n, case in enumerate(prompts)]
    for n, result in generate(engine, scored).items():
        ours = [p for p in (result.prompt_logprobs or []) + result.logprobs if p is not None]
        pairs = zip(ours, theirs[n].prompt_logprobs + theirs[n].logprobs, strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-3
    longest = max(len(case.ids) for case in prompts)
    budget = longest if "paligemma" in name else 7
    assert answers(load(folder, max_batch_prefill_tokens=budget, block_size=1), requests) == ids
    engine = load(folder, max_total_tokens=longest + NEW, max_batch_total_tokens=(longest + NEW) // 16 * 16 + 48)
    assert answers(engine, requests) == ids
    assert engine.stats.preemptions > 0


def test_equal_prompts_with_other_images_share_no_blocks(tmp_path: Path) -> None:
    """Their tokens are the same; their keys and values are not, from the image's first row on."""
    folder = save_vision(tmp_path, "llava")
    first, second = cases(folder, "llava", [[(40, 40)], [], [(41, 40)]])[::2]
    assert first.ids == second.ids
    engine = load(folder, block_size=4)
    alone = [answers(load(folder, prefix_caching=False), [case.request(0)])[0] for case in (first, second)]
    assert alone[0] != alone[1]
    assert answers(engine, [first.request(0)]) == alone[:1]
    cached = engine.stats.cached_prompt_tokens
    assert answers(engine, [second.request(0)]) == alone[1:]
    assert engine.stats.cached_prompt_tokens == cached
    assert answers(engine, [first.request(0)]) == alone[:1]
    assert engine.stats.cached_prompt_tokens > cached
