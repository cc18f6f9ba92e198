"""How fast a checkpoint loads, and how much memory that takes, beside a plain read of its files.

    python benchmarks/load.py --model DIR      (DIR is made if it is not there: Llama-3.2-1B's shape, bfloat16)

Every round takes, in turn, with the page cache warm: two plain sequential reads of the weights, the load of the
engine, the load out of the packed copy that a first start leaves, and the load without packing (what reading costs of
it); the loads in a process of their own each.

One plain read goes over and over into one buffer, which stays in the processor's cache: it writes nothing to memory. No
loader of its own memory can do that; a mapped copy can. The other keeps what it reads in fresh memory (of large pages
where the system has them), as a loader must; that one is its fair measure.

Seconds of a load are those of the weights alone: no imports, no cache, no first token. CPU seconds are those of all its
threads: they tell something even where other programs run beside it. Peak memory is the process's, less what it had
before the load; kept is what it has after it.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

BUFFER = 16 * 1024 * 1024


def read_plainly(folder: Path) -> float:
    """Seconds to read all weights once, in order, into one buffer."""
    buffer = bytearray(BUFFER)
    since = time.perf_counter()
    for file in sorted(folder.glob("*.safetensors")):
        fd = os.open(file, os.O_RDONLY)
        while os.readv(fd, [buffer]):
            pass
        os.close(fd)
    return time.perf_counter() - since


def read_to_keep(folder: Path) -> float:
    """Seconds to read all weights once, in order, into fresh memory that holds them all."""
    files = sorted(folder.glob("*.safetensors"))
    since = time.perf_counter()
    memory = mmap.mmap(-1, sum(file.stat().st_size for file in files), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    with memoryview(memory) as view:
        at = 0
        for file in files:
            fd = os.open(file, os.O_RDONLY)
            while n := os.readv(fd, [view[at : at + BUFFER]]):
                at += n
            os.close(fd)
    seconds = time.perf_counter() - since
    memory.close()
    return seconds


def load(folder: Path, quantize: str, how: str) -> dict[str, float]:
    """Load the decoder in this process. Returns seconds, and bytes of the peak over what there was before.

    how: pack, bare (without packing), or a folder for its copy, which is written where it is not there."""
    from penstock.devices.allocator import keep_freed_memory
    from penstock.devices.threads import bind_threads

    bind_threads(int(os.environ["OMP_NUM_THREADS"]))
    import torch

    from penstock.engine.config import EngineConfig
    from penstock.engine.load import planned_weight_bytes
    from penstock.engine.weights import load_weights
    from penstock.formats import FORMATS, Format
    from penstock.formats.dense import GatedPair, Plain
    from penstock.hub.weights import read_weights
    from penstock.kernels.stored import whole
    from penstock.models.decoder import Decoder
    from penstock.models.families import describe

    if how == "bare":
        bare = Format(
            lambda weight, bias=None: Plain(whole(weight), bias),
            lambda gate, up, name, b=None, c=None: GatedPair(Plain(whole(gate), b), Plain(whole(up), c), name),
            None,
        )
    engine = EngineConfig(str(folder), packed_copy="off" if how in ("pack", "bare") else how)
    keep_freed_memory()
    torch.ones(64, 64) @ torch.ones(64, 64)  # the thread pool
    before = memory("VmRSS")
    since, since_cpu = time.perf_counter(), time.process_time()
    config, names = describe(folder)
    entries = read_weights(folder)
    if how == "bare":
        decoder = Decoder.load(entries, config, names, torch.bfloat16, 2048, bare)
    else:
        size = planned_weight_bytes(entries, config, names, torch.bfloat16, FORMATS[quantize])
        cpu_device = torch.device("cpu")
        decoder, _ = load_weights(engine, config, names, entries, torch.bfloat16, quantize, 2048, size, cpu_device)
    seconds, cpu = time.perf_counter() - since, time.process_time() - since_cpu
    kept = memory("VmRSS") - before
    for thread in threading.enumerate():
        if thread.name == "packed-copy":
            thread.join()
    del decoder
    return {"seconds": seconds, "cpu": cpu, "peak": memory("VmHWM") - before, "kept": kept}


def memory(field: str) -> int:
    """A size of this process from /proc, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_a_process(folder: Path, quantize: str, how: str) -> dict[str, float]:
    """`load` in a process of its own."""
    arguments = [sys.executable, __file__, "--model", str(folder), "--quantize", quantize, "--child", how]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(load(options.model, options.quantize, options.child)))
        return
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    if not (options.model / "config.json").exists():
        from vs_transformers import make_checkpoint

        make_checkpoint(options.model)
    size = sum(file.stat().st_size for file in options.model.glob("*.safetensors"))
    read_plainly(options.model)  # warms the page cache
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.model.parent) as copies:
        in_a_process(options.model, options.quantize, copies)  # writes it
        for _ in range(options.rounds):
            times: dict[str, Any] = {"plain": read_plainly(options.model), "kept": read_to_keep(options.model)}
            for name, how in (("load", "pack"), ("copy", copies), ("bare", "bare")):
                times[name] = in_a_process(options.model, options.quantize, how)
            rounds.append(times)
    median = statistics.median
    for name, seconds in (
        ("read into one buffer", [r["plain"] for r in rounds]),
        ("read to keep", [r["kept"] for r in rounds]),
        ("load", [r["load"]["seconds"] for r in rounds]),
        ("load of a packed copy", [r["copy"]["seconds"] for r in rounds]),
        ("load without packing", [r["bare"]["seconds"] for r in rounds]),
    ):
        shares = [median(r[k] / s for r, s in zip(rounds, seconds, strict=True)) for k in ("kept", "plain")]
        print(
            f"{name:<22} {median(seconds):6.2f} s ({min(seconds):.2f}-{max(seconds):.2f})  "
            f"{size / 1e9 / median(seconds):5.2f} GB/s  {100 * shares[0]:4.0f} % of the read to keep  "
            f"{100 * shares[1]:4.0f} % of the read into one buffer"
        )
    kept, peak = median(r["load"]["kept"] for r in rounds), median(r["load"]["peak"] for r in rounds)
    print(f"CPU seconds of the load: {median(r['load']['cpu'] for r in rounds):.2f}")
    print(
        f"files {size / 1e9:.2f} GB; kept {kept / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB, "
        f"{100 * (peak / kept - 1):.1f} % over what is kept"
    )


if __name__ == "__main__":
    main()
