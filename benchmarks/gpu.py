"""Every check and every figure of a GPU in one call of at most nine minutes.

    PYTHONPATH=src python benchmarks/gpu.py --json gpu.json

needs PyTorch with CUDA or ROCm, Triton, NumPy, msgspec, tokenizers and safetensors, and no network; the comparison
also needs transformers, the grammars llguidance. What a machine lacks can be wheels on PYTHONPATH, msgspec for one.
Models are shapes with random weights, but for the bundled demo model. Each section is a process of its own with a time
limit, so that a crash loses that section alone, and in it each check is guarded; figures are printed as they come, and
the JSON is written after each section. At the end there is a table of the figures that the GPU engine is judged by:
wanted, found, reached. `--dry` runs the same code on a processor with toy shapes: it tries the script and measures
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_bench import Bench, Figure, guarded
from gpu_checks import encoder, environment, exact, guards, kernels, mixture
from gpu_speed import against, eight, eight_fp8, one, ready, seventy, small

# in the order of their worth: the function, and the most seconds it may take
SECTIONS: dict[str, tuple[Callable[[Bench], Iterator[Figure]], float]] = {
    "environment": (environment, 30),
    "kernels": (kernels, 105),  # compiles, side by side, what the others use
    "exact": (exact, 65),
    "guards": (guards, 45),
    "mixture": (mixture, 45),
    "encoder": (encoder, 25),
    "8B": (eight, 90),
    "8B fp8": (eight_fp8, 105),
    "1B": (one, 30),
    "70B": (seventy, 55),
    "transformers": (against, 55),
    "ready": (ready, 65),
    "small": (small, 40),
}


# what the GPU engine is judged by: a figure's name, and what is wanted of it
JUDGED = {
    "8B bf16 batch 1, share of copy": ">= 0.8 (goal 0.9)",
    "8B fp8 batch 1": ">= 400 tokens/s",
    "8B bf16 step of batch 8 / batch 1": "<= 1.25",
    "8B bf16 batch 32: share of the time the GPU computes": ">= 0.99",
    "8B fp8 1000/1000 saturated": ">= 17,700 tokens/s",
    "8B fp8 128/2048 saturated": ">= 26,000 tokens/s",
    "8B bf16 mix of chats, saturated": ">= 16,000 tokens/s",
    "ours / transformers": ">= 3",
    "70B fp8 batch 1, share of copy": ">= 0.8",
    "1B bf16 batch 1, share of copy": ">= 0.65",
    "8B bf16 first token of 1,000": "<= 30 ms",
    "8B bf16 from command to first token, warm page cache": "<= 15 s",
    "demo float32 = processor, first": "all",
    "demo float32 = processor, all captured": "all",
    "demo bfloat16: likeliest token as in float32": ">= 0.99",
    "deterministic: same bits alone, among 15, among 31": "True",
    "injected OOM fails one batch, the next is served": "True",
}


def verdict(figures: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each figure that counts: wanted, found, reached. figures: by their names."""
    lines = [f"{'judged by':<58} {'wanted':<20} {'found':>14}  reached"]
    for name, wanted in JUDGED.items():
        found = figures.get(name)
        if found is None:
            lines.append(f"{name:<58} {wanted:<20} {'-':>14}  not measured")
            continue
        value = found["value"] if isinstance(found["value"], str) else f"{found['value']:,.4g}"
        lines.append(f"{name:<58} {wanted:<20} {value:>14}  {'yes' if found['ok'] else 'NO'}")
    return lines


def section(name: str, args: argparse.Namespace) -> None:
    """Run one section in this process and append its figures, a JSON line each, to a file."""
    function, _limit = SECTIONS[name]
    known = json.loads(args.known)
    bench = Bench(args.device, args.tiny, args.seconds, known)
    with open(args.lines, "a") as lines:
        for figure in guarded(function, bench):
            print(figure.line(), flush=True)
            lines.write(json.dumps(vars(figure)) + "\n")
            lines.flush()


def main() -> int:
    """Run the sections in turn. Returns 0 when none failed and no figure missed its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=530, help="for all of it")
    parser.add_argument("--json", dest="out", default="gpu.json")
    parser.add_argument("--only", help="names of sections, with commas between them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes")
    parser.add_argument("--dry", action="store_true", help="toy shapes on the processor: tries the script")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--lines", help=argparse.SUPPRESS)
    parser.add_argument("--known", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry:
        args.device, args.tiny = "cpu", True
    if args.section:
        section(args.section, args)
        return 0
    names = args.only.split(",") if args.only else list(SECTIONS)
    end = time.perf_counter() + args.seconds
    report: dict[str, Any] = {}
    known: dict[str, float] = {}
    table: list[str] = []
    for name in names:
        left = end - time.perf_counter()
        seconds = min(SECTIONS[name][1] * (10 if args.tiny else 1), left - 2)
        if seconds < 8:
            report[name] = {"error": "no time left", "figures": []}
            table.append(f"{name}: no time left")
            continue
        print(f"\n== {name}, at most {seconds:.0f} s of {left:.0f}", flush=True)
        figures, error, taken = apart(name, seconds, args, known)
        known |= {f["name"]: f["value"] for f in figures if isinstance(f["value"], float)}
        report[name] = {"figures": figures, "error": error, "seconds": taken}
        table += [Figure(**f).line() for f in figures] + ([f"{name}: {error}"] if error else [])
        Path(args.out).write_text(json.dumps(report, indent=1))
    print("\n== all of it")
    print("\n".join(table))
    found = {figure["name"]: figure for part in report.values() for figure in part["figures"]}
    print("\n" + "\n".join(verdict(found)))
    bad = [n for n, part in report.items() if part["error"] or any(f["ok"] is False for f in part["figures"])]
    print(f"\nfailed or missed: {', '.join(bad) or 'nothing'}; written to {args.out}")
    return 1 if bad else 0


def apart(
    name: str, seconds: float, args: argparse.Namespace, known: dict[str, float]
) -> tuple[list[dict[str, Any]], str, float]:
    """One section as a process of its own: its figures, what went wrong, and the seconds."""
    handle, lines = tempfile.mkstemp(suffix=".jsonl")
    os.close(handle)
    command = [sys.executable, __file__, "--section", name, "--lines", lines, "--device", args.device]
    command += ["--seconds", str(seconds - 6), "--known", json.dumps(known), *(["--tiny"] if args.tiny else [])]
    since, error = time.perf_counter(), ""
    try:
        code = subprocess.run(command, timeout=seconds, stdin=subprocess.DEVNULL).returncode
        error = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        error = f"took more than {seconds:.0f} s"
    found = [json.loads(line) for line in Path(lines).read_text().splitlines()]
    os.unlink(lines)
    return found, error, time.perf_counter() - since


if __name__ == "__main__":
    sys.exit(main())
