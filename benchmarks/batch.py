"""`penstock generate` against the engine's own best, with and without shared prefixes, and its memory.

    python benchmarks/batch.py share    # 2,000 prompts that share 500 tokens, prefix cache on and off
    python benchmarks/batch.py speed    # tokens/s of `generate`, of `LLM`, and of the bare engine, in turn
    python benchmarks/batch.py memory   # largest resident size for 10^4 .. 10^6 rows

`--model`: the demo model by default, whose steps are so short that everything around them shows.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORDS = ("the", "a", "small", "red", "fox", "old", "house", "river", "runs", "over", "light", "story", "day", "child")


def generate(model: str, source: Path, output: Path, *flags: str) -> dict[str, Any]:
    """One run of the command: its summary."""
    command = [sys.executable, "-m", "penstock.cli.main", "generate", model, "-i", str(source), "-o", str(output)]
    done = subprocess.run([*command, "--json", *flags], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def share(model: str, folder: Path, tokens: int) -> None:
    """The same prompts, with the prefix cache and without."""
    from penstock.hub.snapshot import resolve
    from penstock.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(resolve(model).path)
    assert tokenizer is not None
    rng, prefix = random.Random(1), ""
    while len(tokenizer.encode(prefix)) < 500:
        prefix += f"{rng.choice(WORDS)} "
    source = folder / "shared.txt"
    source.write_text("".join(f"{prefix}{words(rng, 8)} {n}\n" for n in range(2000)))
    seconds = {}
    for name, flag in (("on", "--prefix-caching"), ("off", "--no-prefix-caching")):
        found = generate(model, source, folder / f"{name}.jsonl", "--max-new-tokens", str(tokens), flag)
        seconds[name] = found["generate_seconds"]
        print(f"cache {name:>3}: {found['generate_seconds']:6.2f} s for {found['done']} rows of {tokens} new tokens")
    print(f"ratio {seconds['off'] / seconds['on']:.1f}")


def speed(model: str, folder: Path, tokens: int, rounds: int) -> None:
    """The same rows through the command, through LLM and through the engine alone, in turn."""
    rng = random.Random(2)
    prompts = [words(rng, 12) for _ in range(512)]
    source = folder / "p.txt"
    source.write_text("".join(f"{prompt}\n" for prompt in prompts))
    script = Path(__file__).with_name("batch_engine.py")
    rates: dict[str, list[float]] = {"engine": [], "generate": [], "LLM": []}
    for _ in range(rounds):
        for way in ("engine", "LLM"):
            command = [sys.executable, str(script), way, model, str(source), str(tokens)]
            rates[way].append(float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split()[-1]))
        flags = ("--max-new-tokens", str(tokens), "--ignore-eos", "--overwrite")
        found = generate(model, source, folder / "o.jsonl", *flags)
        rates["generate"].append(found["tokens"] / found["generate_seconds"])
    for name, found_rates in rates.items():
        shares = [rate / best for rate, best in zip(found_rates, rates["engine"], strict=True)]
        median, part = statistics.median(found_rates), statistics.median(shares)
        print(f"{name:>8}: {median:9,.0f} tokens/s, {part:6.1%} of the engine")


def memory(model: str, folder: Path, sizes: list[int]) -> None:
    """The largest resident size; above 10^5 rows all but the last 10^4 are done already, as after a kill."""
    for rows in sizes:
        source, output = folder / f"{rows}.jsonl", folder / f"{rows}.out.jsonl"
        with source.open("w") as file:
            file.writelines(f'{{"id": "row-{n}", "prompt": "fox {n % 97}"}}\n' for n in range(rows))
        known = prepare(model, source, output, rows - 10_000) if rows > 100_000 else 0
        since = time.monotonic()
        script = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stderr=subprocess.DEVNULL); "
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
        )
        command = [sys.executable, "-m", "penstock.cli.main", "generate", model, "-i", str(source), "-o", str(output)]
        done = subprocess.run(
            [sys.executable, "-c", script, *command, "--max-new-tokens", "1"], stdout=subprocess.PIPE, check=True
        )
        seconds = time.monotonic() - since
        print(f"{rows:>9,} rows ({known:,} done before): {float(done.stdout):6.0f} MiB, {seconds:5.1f} s", flush=True)


def prepare(model: str, source: Path, output: Path, done: int) -> int:
    """Write the output of a run that was killed after `done` rows."""
    import msgspec

    from penstock.batch.rows import RowFile

    head = source.with_suffix(".head.jsonl")
    with source.open() as file:
        head.write_text(file.readline())
    generate(model, head, output, "--max-new-tokens", "1")
    first = json.loads(output.read_text())

    def lines() -> Iterator[bytes]:
        for n, row in enumerate(RowFile(source)):
            if n == done:
                return
            yield msgspec.json.encode({**first, "id": row.name, "hash": row.identity()}) + b"\n"

    with output.open("wb") as file:
        file.writelines(lines())
    return done


def main() -> None:
    """What the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["share", "speed", "memory"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tokens", type=int, default=16, help="new tokens a row")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if asked.what == "share":
            share(asked.model, Path(name), asked.tokens)
        elif asked.what == "speed":
            speed(asked.model, Path(name), asked.tokens, asked.rounds)
        else:
            memory(asked.model, Path(name), asked.rows)


if __name__ == "__main__":
    main()
