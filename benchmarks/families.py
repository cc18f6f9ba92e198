"""Decoding of other families beside Llama's, at equal widths and depths: tokens/s for each byte of weights, in turn.

    python benchmarks/families.py [--streams 8] [--rounds 5] [--only NAME]

Random weights. A family whose MLP is not gated, or whose head is not tied, has other bytes to read than Llama; so what
is compared is bytes of weights a second: a step costs what it reads, and what the family adds to that shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
MULTI_HEAD = {**{k: v for k, v in SIZES.items() if k != "head_dim"}, "num_key_value_heads": 16}
SHORT = {
    "n_embd": 1024,
    "n_layer": 12,
    "n_head": 16,
    "n_positions": 2048,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", **SIZES, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", **SIZES},
    "qwen3": {"model_type": "qwen3", **SIZES},
    "phi": {"model_type": "phi", **MULTI_HEAD, "partial_rotary_factor": 0.5},
    "phi3": {"model_type": "phi3", **SIZES},
    "gemma": {"model_type": "gemma", **SIZES},
    "gemma2": {"model_type": "gemma2", **SIZES, "query_pre_attn_scalar": 64},
    "gemma3": {"model_type": "gemma3_text", **SIZES, "query_pre_attn_scalar": 64},
    "falcon": {"model_type": "falcon", **MULTI_HEAD, "parallel_attn": True, "multi_query": True},
    "falcon-rw": {"model_type": "falcon", **MULTI_HEAD, "alibi": True, "multi_query": False, "parallel_attn": False},
    "bloom": {"model_type": "bloom", **SHORT, "hidden_size": 1024},
    "opt": {"model_type": "opt", **MULTI_HEAD, "ffn_dim": 4096, "word_embed_proj_dim": 1024},
    "gpt_neox": {"model_type": "gpt_neox", **MULTI_HEAD},
    "gptj": {"model_type": "gptj", **SHORT, "rotary_dim": 64},
    "gpt2": {"model_type": "gpt2", **SHORT},
    "gpt_bigcode": {"model_type": "gpt_bigcode", **SHORT},
    "starcoder2": {"model_type": "starcoder2", **SIZES, "sliding_window": None},
    "stablelm": {"model_type": "stablelm", **SIZES},
    "olmo": {"model_type": "olmo", **SIZES},
    "olmo2": {"model_type": "olmo2", **SIZES},
    "granite": {"model_type": "granite", **SIZES},
    "cohere": {"model_type": "cohere", **SIZES},
    "smollm3": {"model_type": "smollm3", **SIZES},
}
LLAMA = {"model_type": "llama", **SIZES}


def start(folder: Path, config: dict[str, Any], streams: int) -> Any:
    """An engine with random weights."""
    from penstock.engine.config import EngineConfig
    from penstock.engine.loop import EngineLoop

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    options = {"max_total_tokens": 256, "max_batch_size": streams, "prefix_caching": False}
    return EngineLoop.load(EngineConfig(str(folder), dtype="bfloat16", dummy_weights=True, **options))


def bytes_per_second(engine: Any, streams: int, tokens: int = 24) -> float:
    """Bytes of weights that decoding reads in a second, by the median step."""
    from penstock.engine.request import EngineRequest

    for i in range(streams):
        engine.add(EngineRequest(i, [3 + i] * 32, tokens, ignore_eos=True))
    steps = []
    while engine.has_work:
        since = time.perf_counter()
        engine.step()
        steps.append(time.perf_counter() - since)
    work = engine.cost.step([(1, 48)] * streams, streams)
    return float(work.weight_bytes) / statistics.median(steps[2:-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=FAMILIES)
    options = parser.parse_args()
    from penstock.devices.threads import bind_threads

    bind_threads()
    with tempfile.TemporaryDirectory() as folder:
        llama = start(Path(folder) / "llama", LLAMA, options.streams)
        for name in [options.only] if options.only else FAMILIES:
            engine = start(Path(folder) / name, FAMILIES[name], options.streams)
            ratios = []
            for _ in range(options.rounds):
                theirs = bytes_per_second(llama, options.streams)
                ratios.append(bytes_per_second(engine, options.streams) / theirs)
            low, high = min(ratios), max(ratios)
            print(f"{name:>12}  {statistics.median(ratios):.2f} of Llama's ({low:.2f}-{high:.2f})", flush=True)


if __name__ == "__main__":
    main()
