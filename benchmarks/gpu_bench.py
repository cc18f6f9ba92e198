"""What every check of gpu.py works with: shapes of models, an engine, figures, and checks that fail by themselves."""

from __future__ import annotations

import gc
import json
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src" / "penstock" / "demo" / "model"
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA_3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama(hidden: int, layers: int, heads: int, kv_heads: int, wide: int, **more: Any) -> dict[str, Any]:
    """config.json of a Llama 3."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": wide,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA_3,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        **more,
    }


SHAPES = {
    "1B": llama(2048, 16, 32, 8, 8192, head_dim=64, tie_word_embeddings=True),
    "8B": llama(4096, 32, 32, 8, 14336),
    "70B": llama(8192, 80, 64, 8, 28672),
}
MIXTURE = llama(2048, 16, 32, 8, 4096) | {  # sixteen layers of eight experts, two of them for each token
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_scaling": None,
}
ENCODER = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 32128,
    "d_model": 1024,
    "d_kv": 64,
    "d_ff": 2816,
    "num_layers": 8,
    "num_heads": 16,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "dtype": "float32",
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}
SHAPES |= {"mixture": MIXTURE}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY |= {"intermediate_size": 128, "vocab_size": 512, "max_position_embeddings": 4096}


@dataclass(frozen=True)
class Figure:
    """One line of the table. goal: what it should reach, as text; ok: whether it does, None where nobody says."""

    name: str
    value: float | str
    unit: str = ""
    goal: str = ""
    ok: bool | None = None

    def line(self) -> str:
        """The figure for people."""
        value = self.value if isinstance(self.value, str) else f"{self.value:,.4g}"
        verdict = "" if self.ok is None else "ok" if self.ok else "MISSED"
        return f"{self.name:<58} {value:>14} {self.unit:<9} {self.goal:<14} {verdict}"


def at_least(name: str, value: float, goal: float, unit: str = "") -> Figure:
    return Figure(name, value, unit, f">= {goal:g}", value >= goal)


def at_most(name: str, value: float, goal: float, unit: str = "") -> Figure:
    return Figure(name, value, unit, f"<= {goal:g}", value <= goal)


def guarded(check: Callable[..., Iterable[Figure]], *given: Any) -> Iterator[Figure]:
    """The figures of one check. Where it fails, that is a figure too, and the next check runs all the same."""
    try:
        yield from check(*given)
    except Exception as error:
        traceback.print_exc()
        yield Figure(f"{check.__name__}: failed", f"{type(error).__name__}: {error}"[:100], ok=False)


class Bench:
    """What every section works with."""

    def __init__(self, device: str, tiny: bool, seconds: float, known: dict[str, float]) -> None:
        import torch

        self.device, self.tiny, self.known = device, tiny, known
        self.deadline = time.perf_counter() + seconds
        self.torch = torch
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-gpu-"))

    @property
    def left(self) -> float:
        """Seconds of this section."""
        return self.deadline - time.perf_counter()

    def model(self, shape: str) -> Path:
        """A folder with the config.json of a shape."""
        folder = self.folder / shape
        folder.mkdir(exist_ok=True)
        config = {**SHAPES[shape], **(TINY if self.tiny else {})}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def encoder_decoder(self) -> Path:
        """A folder with the config.json of a T5."""
        folder = self.folder / "t5"
        folder.mkdir(exist_ok=True)
        tiny = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 512}
        (folder / "config.json").write_text(json.dumps({**ENCODER, **(tiny if self.tiny else {})}))
        return folder

    def load(self, folder: Path, *, dummy: bool = True, **options: Any) -> Any:
        """An engine on the device. One that nobody holds any longer gives its memory back first; those of the bundled
        model, of which there may be several at a time, take a little of it."""
        from penstock.engine.config import EngineConfig
        from penstock.engine.loop import EngineLoop

        def say(stage: Any) -> None:
            print(f"  {stage.name:<10} {stage.seconds:6.2f} s  {stage.text}", flush=True)

        options = {"dtype": "bfloat16", "device": self.device, **options}
        gc.collect()  # an engine is full of circles
        if options["device"] != "cpu":
            self.torch.cuda.empty_cache()
            if not dummy:
                options["kv_cache_gib"] = 2.0
        if self.tiny and dummy:
            options["max_batch_total_tokens"] = 2**15
            options["max_total_tokens"] = min(2048, options.get("max_total_tokens", 2048))
        return EngineLoop.load(EngineConfig(str(folder), dummy_weights=dummy, **options), say)

    def prompt(self, rng: random.Random, length: int, vocab: int) -> list[int]:
        return rng.choices(range(10, vocab), k=length)


def request(number: int, prompt: list[int], new: int, **fields: Any) -> Any:
    from penstock.engine.request import EngineRequest

    return EngineRequest(number, prompt, new, ignore_eos=True, **fields)


def run(loop: Any, requests: list[Any]) -> dict[int, Any]:
    """All requests to their end: their tokens, log-probabilities, alternatives of the prompt and how they ended."""
    found: dict[int, Any] = {
        r.id: {"ids": [], "logprobs": [], "prompt_top": [], "finish": "", "error": "", "embedding": b""}
        for r in requests
    }
    for r in requests:
        loop.add(r)
    while loop.has_work:
        for output in loop.step().outputs:
            result = found[output.id]
            result["ids"] += [token.id for token in output.tokens]
            result["logprobs"] += [token.logprob for token in output.tokens]
            result["prompt_top"] += output.prompt_top or []
            result["finish"] = output.finish or result["finish"]
            result["error"] = output.error or result["error"]
            result["embedding"] += output.embedding or b""
    return found


def equal_texts(name: str, ours: dict[int, Any], theirs: dict[int, Any], must: bool = True) -> Figure:
    """How many of the texts have the same tokens. must: it is said that all have."""
    equal = sum(ours[i]["ids"] == theirs[i]["ids"] and not ours[i]["error"] for i in theirs)
    good = equal == len(theirs)
    return Figure(name, f"{equal} of {len(theirs)}", "texts", "all" if must else "", good if must else None)


def stream(b: Bench, loop: Any, batch: int, new: int, prompt: int = 32, **fields: Any) -> tuple[float, float]:
    """Seconds of a step that decodes `batch` sequences, the median after the first few; and the share of that time in
    which the device computed."""
    rng, new = random.Random(batch), min(new, 12) if b.tiny else new
    vocab = loop.limits.vocab_size
    for i in range(batch):
        loop.add(request(i, b.prompt(rng, prompt, vocab), new, **fields))
    taken, busy, since = [], [], time.perf_counter()
    while loop.has_work:
        step = loop.step()
        now = time.perf_counter()
        if len(step.outputs) == batch:
            taken.append(now - since)
            busy.append(step.stats.model_seconds)
        since = now
    first = len(taken) // 4
    return statistics.median(taken[first:]), sum(busy[first:]) / sum(taken[first:])
