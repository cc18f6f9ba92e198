"""transformers: `generate` on a static batch, the checkpoint as it is."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from protocol import Loaded, Setup, Stopwatch, Timing, serve

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def prepare(setup: Setup) -> None:
    """Nothing to convert."""


class Watching(transformers.StoppingCriteria):
    """Told after each step; never stops."""

    def __init__(self, streams: int) -> None:
        self.watch = Stopwatch(streams)
        self.streams = streams

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.watch.step(range(self.streams))
        return torch.zeros(self.streams, dtype=torch.bool)


def load(setup: Setup) -> Loaded:
    torch.set_num_threads(setup.threads)
    network = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=DTYPES[setup.format])
    network.generation_config.eos_token_id = None

    def run(prompts: list[list[int]], new: int) -> Timing:
        ids = torch.tensor(prompts)
        watching = Watching(len(prompts))
        network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            stopping_criteria=transformers.StoppingCriteriaList([watching]),
        )
        return watching.watch.timing()

    return Loaded(f"transformers {transformers.__version__}", run)


if __name__ == "__main__":
    serve(prepare, load)
