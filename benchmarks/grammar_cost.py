"""What grammars cost: decode tokens/s with and without one, and what hostile grammars do to the streams beside them.

Both comparisons run in turn, in one process, on one model: `python benchmarks/grammar_cost.py --model DIR` (default:
the demo model).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest, Grammar
from penstock.server.grammars import Grammars
from penstock.text.grammar import GrammarRefused, GrammarSpec, source_of

DEMO = Path(__file__).parents[1] / "src/penstock/demo/model"
SCHEMA = {
    "type": "array",
    "minItems": 200,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "count": {"type": "integer", "minimum": 0, "maximum": 999},
            "kind": {"enum": ["cat", "dog", "fox"]},
        },
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(DEMO))
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flood", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flood:
        asyncio.run(flood(options.model))
        return
    torch.set_num_threads(options.threads)
    engine = EngineLoop.load(EngineConfig(options.model, threads=options.threads))
    compare_speed(engine, options)
    compare_steps(engine, options)


def compare_speed(engine: EngineLoop, options: argparse.Namespace) -> None:
    """Decode tokens/s, free and under a schema, in turn."""
    grammar = Grammar(source_of(GrammarSpec("json_schema", SCHEMA)))
    decode(engine, options, grammar)
    pairs = [(decode(engine, options, None), decode(engine, options, grammar)) for _ in range(options.rounds)]
    ratios = [bound / free for free, bound in pairs]
    print(
        f"{options.streams} streams: {statistics.median(f for f, _ in pairs):,.0f} tokens/s free, "
        f"{statistics.median(b for _, b in pairs):,.0f} with a schema; "
        f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}, {options.rounds} rounds)",
        flush=True,
    )


def decode(engine: EngineLoop, options: argparse.Namespace, grammar: Grammar | None) -> float:
    """Tokens/s from the moment when every stream decodes."""
    for i in range(options.streams):
        engine.add(EngineRequest(i, [5 + i, 6, 7], options.tokens, ignore_eos=True, grammar=grammar))
    started: set[int] = set()
    while len(started) < options.streams:
        started |= {output.id for output in engine.step().outputs}
    since, made = time.perf_counter(), 0
    while engine.has_work:
        made += sum(len(output.tokens) for output in engine.step().outputs)
    return made / (time.perf_counter() - since)


def compare_steps(engine: EngineLoop, options: argparse.Namespace) -> None:
    """p99 of a stream's time per token, in peace and while hostile grammars keep the forge busy, in turn."""
    ratios, quiet_ms, busy_ms = [], [], []
    for _ in range(options.rounds):
        quiet = percentile_99(engine, options)
        command = [sys.executable, __file__, "--flood", "--model", options.model]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        busy = percentile_99(engine, options)
        child.communicate(timeout=10)
        ratios.append(busy / quiet)
        quiet_ms.append(quiet * 1000)
        busy_ms.append(busy * 1000)
    print(
        f"p99 time per token of {options.streams} streams: {statistics.median(quiet_ms):.2f} ms in peace, "
        f"{statistics.median(busy_ms):.2f} ms under hostile grammars; "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}, {options.rounds} rounds)",
        flush=True,
    )


def percentile_99(engine: EngineLoop, options: argparse.Namespace) -> float:
    """Seconds between tokens over four batches."""
    gaps = []
    for _ in range(4):
        for i in range(options.streams):
            engine.add(EngineRequest(i, [5 + i, 6, 7], options.tokens, ignore_eos=True))
        engine.step()
        last = time.perf_counter()
        while engine.has_work:
            engine.step()
            now = time.perf_counter()
            gaps.append(now - last)
            last = now
    return statistics.quantiles(gaps, n=100)[98]


async def flood(model: str) -> None:
    """Ask for costly grammars, eight at a time and never the same, until stdin closes."""
    engine_limits = EngineLoop.load(EngineConfig(model)).limits
    grammars = Grammars.of(model, engine_limits.vocab_size, engine_limits.eos_ids)
    await grammars.compile_grammar(GrammarSpec("json_object"))
    number = 0

    async def attack() -> None:
        nonlocal number
        while True:
            number += 1
            patterns = [f".*a.{{10}}{i}.*{number}" for i in range(12)]
            schema = {"allOf": [{"type": "string", "pattern": pattern} for pattern in patterns]}
            try:
                await grammars.compile_grammar(GrammarSpec("json_schema", schema))
            except GrammarRefused:
                pass

    attackers = [asyncio.create_task(attack()) for _ in range(8)]
    await asyncio.sleep(0.3)
    print("busy", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for attacker in attackers:
        attacker.cancel()
    grammars.close()


if __name__ == "__main__":
    main()
