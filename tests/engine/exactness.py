"""Compares the engine with transformers on one checkpoint: tokens of greedy generation and logits, in float32.

`python -m tests.engine.exactness [--count N] [--seed S] [MODEL_TYPE ...]` does so for random configurations.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest
from penstock.kernels.attention import RunGroup
from penstock.models.inputs import StepInputs
from tests.checkpoints import save_model
from tests.engine.driver import generate
from tests.families import RANDOM, Options, random_options

TIE = 1e-5  # logits nearer than this are equal for anybody's float32


@dataclass(frozen=True)
class Difference:
    """tokens: of prompts whose continuations differ (ours, theirs); logits: the largest difference of any."""

    tokens: list[tuple[list[int], list[int]]]
    logits: float

    @property
    def exact(self) -> bool:
        return not self.tokens and self.logits <= 1e-3


def made_prompts(count: int, longest: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, vocab_size) for _ in range(rng.randrange(1, longest))] for _ in range(count)]


def compare(
    folder: Path, rows: list[list[int]], new: int, by_generation: bool = False, **options: int | bool
) -> Difference:
    """The engine's greedy continuations of `rows`, made together, twice (the second time with cached prefixes), against
    transformers'.

    by_generation: against transformers' own generation, token by token; else one forward pass over our text says at
    every place which token would have come. options: of EngineConfig.
    """
    engine = EngineLoop.load(EngineConfig(str(folder), dtype="float32", **options))  # type: ignore[arg-type]
    requests = [EngineRequest(id=i, prompt_ids=row, max_new_tokens=new, ignore_eos=True) for i, row in enumerate(rows)]
    first, second = generate(engine, requests), generate(engine, requests)
    assert engine.stats.used_blocks == 0
    ours = [first[i].ids for i in range(len(rows))]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    worst, wrong = 0.0, []
    for i, (row, ids) in enumerate(zip(rows, ours, strict=True)):
        assert first[i].error is None, first[i].error
        theirs, scores = generated(folder, row, new) if by_generation else foreseen(model, row, ids)
        if ids != theirs or second[i].ids != theirs:
            wrong.append((ids if ids != theirs else second[i].ids, theirs))
        if scores is not None:
            worst = max(worst, float((decoder_logits(engine, row + ids[:-1]) - scores).abs().max()))
    return Difference(wrong, worst)


@torch.inference_mode()
def foreseen(model: PreTrainedModel, row: list[int], ids: list[int]) -> tuple[list[int], Tensor]:
    """What transformers would choose at each place of row + ids from row's end on, and all its logits."""
    scores = model(torch.tensor([row + ids[:-1]]), use_cache=False).logits[0]
    places = scores[len(row) - 1 :]
    best = places.argmax(-1)
    tied = places.gather(1, torch.tensor(ids).unsqueeze(1)).squeeze(1) > places.amax(-1) - TIE
    return torch.where(tied, torch.tensor(ids), best).tolist(), scores


def generated(folder: Path, row: list[int], new: int) -> tuple[list[int], None]:
    """transformers' greedy continuation, end of sequence ignored.

    A fresh model for each: with dynamic rope scaling transformers carries the longest length over to later calls.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([row])
    ids = model.generate(prompt, max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(prompt))
    return ids[0, len(row) :].tolist(), None


@torch.inference_mode()
def decoder_logits(engine: EngineLoop, ids: list[int]) -> Tensor:
    """Our logits at every place of a text, computed in one step. [T, vocab]"""
    decoder, block = engine._decoder, 16
    count = -(-len(ids) // block)
    step = StepInputs(
        ids=torch.tensor(ids),
        positions=torch.arange(len(ids)),
        spans=None if decoder.config.span_rope is None else torch.full((len(ids),), len(ids)),
        slots=torch.arange(len(ids)),
        groups=[RunGroup(0, len(ids), [len(ids)], torch.arange(count).unsqueeze(0))],
    )
    return decoder.logits(decoder.forward(step, decoder.new_cache(count, block)))


def compare_random(model_type: str, seed: int, new: int = 24) -> tuple[Options, Difference]:
    """One random configuration of a family, served in a random way."""
    rng = random.Random(f"{model_type} {seed}")
    options = random_options(model_type, rng)
    rows = made_prompts(4, 60, options["vocab_size"], seed)
    serving = {"max_batch_prefill_tokens": rng.choice([7, 64, 2048]), "block_size": rng.choice([1, 8, 16])}
    serving |= rng.choice([{}, {"max_total_tokens": 96, "max_batch_total_tokens": 144}])
    rope = options.get("rope_parameters") or {}
    with tempfile.TemporaryDirectory() as folder:
        path = save_model(Path(folder), options, seed)
        return options, compare(path, rows, new, by_generation=rope.get("rope_type") == "longrope", **serving)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("model_types", nargs="*")
    arguments = parser.parse_args()
    failed = total = 0
    for model_type in arguments.model_types or RANDOM:
        worst = 0.0
        for seed in range(arguments.seed, arguments.seed + arguments.count):
            total += 1
            try:
                options, difference = compare_random(model_type, seed)
            except Exception as error:  # the next one may tell more
                failed += 1
                print(f"{model_type} {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                continue
            worst = max(worst, difference.logits)
            if not difference.exact:
                failed += 1
                print(
                    f"{model_type} {seed}: {len(difference.tokens)} texts, {difference.logits:.2g}", options, flush=True
                )
        print(f"{model_type}: largest difference of logits {worst:.1e}", flush=True)
    print(f"{total - failed} of {total} exact")


if __name__ == "__main__":
    main()
