"""Tokens/s of the bare engine, and of `penstock.LLM`, for a file of prompts: `batch_engine.py engine|LLM MODEL FILE N`.

The engine gets token ids and keeps them; nothing is read, ordered, decoded or written.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path


def engine_rate(model: str, prompts: list[str], tokens: int) -> float:
    """All rows in the engine at once, steps until it is empty."""
    from penstock.devices.threads import bind_threads

    bind_threads(None)
    from penstock.engine.config import EngineConfig
    from penstock.engine.loop import EngineLoop
    from penstock.engine.request import EngineRequest
    from penstock.hub.snapshot import resolve
    from penstock.text.tokenizer import load_tokenizer

    path = resolve(model).path
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    engine = EngineLoop.load(EngineConfig(model_path=str(path)))
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    since = time.perf_counter()
    for number, prompt in enumerate(ids):
        engine.add(EngineRequest(id=number, prompt_ids=prompt, max_new_tokens=tokens, ignore_eos=True))
    count = 0
    while engine.has_work:
        count += sum(len(output.tokens) for output in engine.step().outputs)
    return count / (time.perf_counter() - since)


def llm_rate(model: str, prompts: list[str], tokens: int) -> float:
    """From texts to texts."""
    from penstock import LLM

    with LLM(model, progress=False) as llm:
        since = time.perf_counter()
        results = llm.generate(prompts, max_new_tokens=tokens, ignore_eos=True)
        seconds = time.perf_counter() - since
    return sum(result.generated_tokens for result in results) / seconds


if __name__ == "__main__":
    way, model, file, count = sys.argv[1:]
    rate = engine_rate if way == "engine" else llm_rate
    print(rate(model, Path(file).read_text().splitlines(), int(count)))
