"""The farm beside the engine alone: `python benchmarks/farm.py [--model demo] [--prompts 4000] [--rounds 3]`.

In turn, `penstock generate` and `penstock farm run` answer the same prompts with the same options, each in processes of
its own. Compared are tokens a second while the model is in memory; the farm's include claims, journals and commits.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def penstock(*args: object) -> str:
    line = [sys.executable, "-m", "penstock.cli.main", *map(str, args)]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo")
    parser.add_argument("--prompts", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    words = [
        "how",
        "do",
        "I",
        "list",
        "my",
        "jobs",
        "on",
        "Slurm",
        "what",
        "does",
        "sinfo",
        "show",
        "a",
        "partition",
        "node",
        "serve",
        "model",
        "cat",
        "sat",
        "lake",
        "fox",
    ]
    rng, ratios = random.Random(1), []
    options = ["--max-new-tokens", asked.tokens, "--ignore-eos"]
    options += ["--threads", asked.threads] if asked.threads else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = folder / "p.txt"
        prompts.write_text("".join(f"{' '.join(rng.choices(words, k=8))}\n" for _ in range(asked.prompts)))
        for number in range(asked.rounds):
            output = folder / f"{number}.jsonl"
            line = ("generate", asked.model, "-i", prompts, "-o", output, "--json", *options)
            alone = json.loads(penstock(*line))
            farm = folder / f"farm{number}"
            penstock("farm", "run", "-m", asked.model, "-i", prompts, "-o", farm, "--stats", *options)
            rates = alone["tokens"] / alone["generate_seconds"], farm_rate(farm)
            ratios.append(rates[1] / rates[0])
            print(f"engine {rates[0]:,.0f} tokens/s, farm {rates[1]:,.0f}: {ratios[-1]:.3f}", flush=True)
    print(f"median {statistics.median(ratios):.3f}")


def farm_rate(farm: Path) -> float:
    """Tokens a second of a farm of one worker."""
    return float(json.loads((farm / "stats.json").read_text())["total"]["tokens_per_second"])


if __name__ == "__main__":
    main()
