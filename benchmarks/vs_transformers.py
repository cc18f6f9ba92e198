"""Penstock's engine against transformers' generate on one random checkpoint, interleaved in one run.

    python benchmarks/vs_transformers.py --model DIR      (DIR is made if it is not there: Llama-3.2-1B's shape)

Each engine lives in a process of its own with the same number of threads; the parent lets them run in turn, so that
both see the same machine. Greedy, end of sequence ignored; the figure is output tokens over the whole time of a batch,
prompt included. Both get the same random prompts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
}


def make_checkpoint(folder: Path) -> None:
    """Write random bfloat16 weights of SHAPE."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)


def prompts(rows: int, length: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1000, SHAPE["vocab_size"] - 1000) for _ in range(length)] for _ in range(rows)]


def serve_penstock(model: str, dtype: str, quantize: str) -> None:
    from penstock.devices.threads import bind_threads

    bind_threads(int(os.environ["OMP_NUM_THREADS"]))
    from penstock.engine.config import EngineConfig
    from penstock.engine.loop import EngineLoop
    from penstock.engine.request import EngineRequest

    engine = EngineLoop.load(
        EngineConfig(model, dtype=dtype, quantize=quantize, prefix_caching=False),
        lambda stage: print(f"penstock: {stage.name}: {stage.text} ({stage.seconds:.1f} s)", file=sys.stderr),
    )

    def run(rows: list[list[int]], new: int) -> list[list[int]]:
        out: list[list[int]] = [[] for _ in rows]
        for i, row in enumerate(rows):
            engine.add(EngineRequest(i, row, new, ignore_eos=True))
        while engine.has_work:
            for output in engine.step().outputs:
                out[output.id] += [t.id for t in output.tokens]
        return out

    answer(run)


def serve_transformers(model: str, dtype: str, _quantize: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    network.generation_config.eos_token_id = None

    def run(rows: list[list[int]], new: int) -> list[list[int]]:
        ids = torch.tensor(rows)
        out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
        return [row[ids.shape[1] :].tolist() for row in out]

    answer(run)


def answer(run: Any) -> None:
    """Time what the parent asks for, a JSON line each way."""
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        rows = prompts(task["rows"], task["prompt"], task["seed"])
        since = time.perf_counter()
        out = run(rows, task["new"])
        seconds = time.perf_counter() - since
        tokens = sum(len(row) for row in out)
        print(json.dumps({"seconds": seconds, "tokens": tokens, "first": [row[0] for row in out]}), flush=True)


def start(engine: str, model: Path, dtype: str, quantize: str, threads: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    if engine == "transformers":  # bound as well: the difference shall not be the binding
        environment.update(OMP_PROC_BIND="true", OMP_PLACES="cores")
    command = [sys.executable, __file__, "--engine", engine, "--model", str(model)]
    command += ["--dtype", dtype, "--quantize", quantize]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == '"ready"', f"{engine} did not start"
    return process


def ask(process: subprocess.Popen[str], task: dict[str, int]) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps(task) + "\n")
    process.stdin.flush()
    result: dict[str, Any] = json.loads(process.stdout.readline())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--engine", choices=("penstock", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantize", default="none", help="weights of penstock: none, int8 or int4")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", default="1,32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    if args.engine:
        {"penstock": serve_penstock, "transformers": serve_transformers}[args.engine](
            str(args.model), args.dtype, args.quantize
        )
        return
    if not (args.model / "config.json").exists():
        make_checkpoint(args.model)
    engines = {
        name: start(name, args.model, args.dtype, args.quantize, args.threads) for name in ("penstock", "transformers")
    }
    for streams in map(int, args.streams.split(",")):
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for round_number in range(args.rounds + 1):  # the first warms up
            task = {"rows": streams, "prompt": args.prompt, "new": args.new, "seed": round_number}
            for name, process in engines.items():
                result = ask(process, task)
                assert result["tokens"] == streams * args.new
                if round_number:
                    rates[name].append(result["tokens"] / result["seconds"])
        ratios = [ours / theirs for ours, theirs in zip(*rates.values(), strict=True)]
        medians = {name: statistics.median(values) for name, values in rates.items()}
        print(
            f"{streams} streams, prompt {args.prompt}, new {args.new}, {args.dtype}, weights {args.quantize}, "
            f"{args.threads} threads: "
            + ", ".join(f"{name} {value:.1f} tokens/s" for name, value in medians.items())
            + f", ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}, {args.rounds} rounds)",
            flush=True,
        )
    for process in engines.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


if __name__ == "__main__":
    main()
