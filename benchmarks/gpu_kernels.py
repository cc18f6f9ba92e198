"""Every GPU kernel on the card that is here: right at random shapes, and how near to the card's own limits.

    python benchmarks/gpu_kernels.py --seconds 240 --json kernels.json [--tune]

Three parts, each given a share of the time: correctness (the functions that the tests run on the interpreter), speed
(bytes that must move over the time of a launch in a replayed graph, as a share of a copy's; arithmetic as a share of a
large matrix product's), and with --tune the sizes of the products' programs, of which the best belong into
`vector_tile` and `strip_tile` of kernels/triton/product.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from penstock.kernels.attention import PagedBatch
from penstock.kernels.norms import gate_product, quantize_rows, rms_norm
from penstock.kernels.sampling import DrawRule
from penstock.kernels.triton import penalties, product, sampler
from penstock.kernels.triton.attention import paged_attention
from penstock.kernels.triton.rotary import rotate_into_cache
from tests.kernels import triton_twins as twins

ROWS = (1, 2, 4, 8, 16, 32, 64)
FORMS = ("bf16", "fp8", "int8", "int4")
SHAPES = {  # [out, in] of matrices that are multiplied once a layer or a step
    "8B qkv": (6144, 4096),
    "8B out": (4096, 4096),
    "8B gate+up": (14336, 4096),
    "8B down": (4096, 14336),
    "8B head": (128256, 4096),
    "1B qkv": (3072, 2048),
    "1B down": (2048, 8192),
    "70B out": (8192, 8192),
}
VECTOR_TILES = (  # columns, inputs of a step, steps on their way, warps
    *((n, k, stages, 4) for n, k in ((4, 512), (8, 512), (4, 1024), (8, 1024), (2, 2048)) for stages in (2, 4, 6)),
    *((16, 256, 4, 4), (16, 512, 4, 8), (1, 2048, 4, 1), (1, 1024, 6, 1)),
)
STRIP_TILES = (
    *((16, k, stages, 4) for k in (128, 256) for stages in (3, 4, 6)),
    *((32, k, stages, 4) for k in (64, 128, 256) for stages in (3, 5)),
    *((64, 64, 4, 4), (64, 128, 3, 4), (64, 128, 4, 8)),
)
SPAN = 600e6  # bytes that a measurement goes over, several times what the card caches


def seconds_of(calls: list[Callable[[], object]], repeats: int = 3) -> float:
    """Seconds of a call, of several that do the same to different memory, in a replayed graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return min(times)


def limits() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and bf16 operations a second of a large product."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of([lambda: target.copy_(source)] * 4)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"copy_bytes": copied, "bf16_operations": 2 * 8192**3 / seconds_of([lambda: a @ b] * 8)}


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    """What must be right, everything early; among it the compilation of what is timed later."""
    bf16, half, full = torch.bfloat16, torch.float16, torch.float32
    card = "cuda"
    for seed in range(40):

        def check(name: str, twin: Callable[..., None], *given: Any, seed: int = seed, **named: Any) -> Any:
            return f"{name} {seed}", lambda: twin(twins.seeded(seed), card, *given, **named)

        for dtype in (full, bf16, half):
            yield check(f"attention {dtype}", twins.attends, dtype, size=6)
        yield check("attention of short runs", twins.attends, bf16, lengths=[1, 1, 3, 8], size=20)
        yield check("norms", twins.normalizes, bf16 if seed % 2 else full)
        yield check("draws", twins.draws, 128256, 16, spread=(0.01, 1.0, 3.0)[seed % 3])
        yield check("penalties", twins.penalizes, 32003)
        yield check("write", twins.writes, bf16, bf16, scaled=False)
        for i, form in enumerate(FORMS):
            for rows in (1, 16, 130, (2, 3, 33, 64, 700)[(seed + i) % 5]):
                yield check(f"product {form} {rows}", twins.multiplies, bf16, form, rows, size=4)
            for rows in (1, 17, 300):
                yield check(
                    f"experts {form} {rows}", twins.mixes, bf16, form, rows, weighs_input=bool(seed % 2), size=4
                )
        for cache in (torch.float8_e4m3fn, torch.float8_e5m2):
            yield check(f"attention {cache}", twins.attends, bf16, cache, size=6)
            yield check(f"write {cache}", twins.writes, bf16, cache, scaled=True)
        if seed == 0:
            for form in FORMS:
                for name, shape in SHAPES.items():
                    yield f"compile {form} {name}", partial(_compile, form, shape, "gate" in name)


def _compile(form: str, shape: tuple[int, int], gated: bool) -> None:
    n, k = shape
    matrix = matrices(form, (min(n, 16384), k), gated, span=1)[0]
    for rows in ROWS:
        product.multiply(matrix, torch.zeros(rows, k, device="cuda", dtype=torch.bfloat16))


def worker(share: int, of: int, seconds: float) -> None:
    """Every so-manieth check, a line of JSON for each: its name, and the first line of its error or null."""
    until = time.monotonic() + seconds
    torch.set_num_threads(1)
    for i, (name, check) in enumerate(checks()):
        if i % of != share:
            continue
        if time.monotonic() > until:
            return
        error = None
        try:
            check()
            torch.cuda.synchronize()
        except Exception as failure:
            error = (str(failure).strip().splitlines() or [type(failure).__name__])[0][:300]
            print(f"FAILED {name}\n{traceback.format_exc()[-1500:]}", file=sys.stderr)
        print(json.dumps([name, error]), flush=True)
        if error is not None and "CUDA error" in error:  # nothing of this process will run any more
            return


def correctness(seconds: float) -> dict[str, Any]:
    """How many checks passed, and which failed. Several processes at once: most of the time goes into compiling."""
    count = max(1, min(12, (os.cpu_count() or 1) - 2))
    command = [sys.executable, __file__, "--seconds", str(seconds)]
    running = [
        subprocess.Popen([*command, "--worker", f"{i}/{count}"], stdout=subprocess.PIPE, text=True)
        for i in range(count)
    ]
    lines = [line for process in running for line in process.communicate()[0].splitlines()]
    told = [json.loads(line) for line in lines]
    failed = {name: error for name, error in told if error is not None}
    ended = [process.returncode for process in running]
    return {"passed": len(told) - len(failed), "failed": failed, "ended_badly": sum(code != 0 for code in ended)}


def matrices(form: str, shape: tuple[int, int], gated: bool, span: float = SPAN) -> list[product.DeviceMatrix]:
    """Copies of a random matrix, together larger than any cache."""
    n, k = shape
    count = 2 if gated else 1
    one = product.pack(
        form,
        tuple(torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(count)),
        (None,) * count,
        "silu" if gated else None,
    )
    copies = max(1, int(span / one.weights.nbytes))
    return [one] + [
        product.DeviceMatrix(
            one.form, one.weights.clone(), None if one.scales is None else one.scales.clone(), None, n, k, one.gate
        )
        for _ in range(copies - 1)
    ]


def product_speed(limit: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Products of few rows with the matrices of well-known models, and the vendor's library beside them."""
    for form in FORMS:
        for name, shape in SHAPES.items():
            copies = matrices(form, shape, gated="gate" in name)
            moved = copies[0].weights.nbytes + (0 if copies[0].scales is None else copies[0].scales.nbytes)
            for rows in ROWS:
                x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
                time_ours = seconds_of([partial(product.multiply, m, x) for m in copies])
                found = {"kernel": f"product {form}", "shape": name, "rows": rows, "us": time_ours * 1e6}
                found["bandwidth"] = moved / time_ours / limit["copy_bytes"]
                if form == "bf16":
                    time_theirs = seconds_of([partial(F.linear, x, m.weights) for m in copies])
                    found["library_bandwidth"] = moved / time_theirs / limit["copy_bytes"]
                yield found


def attention_speed(limit: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Decode over long and short contexts, and prompts, in the shape of Llama-3.1-8B."""
    heads, kv_heads, dim, block = 32, 8, 128, 16
    for cache in (torch.bfloat16, torch.float8_e4m3fn):
        for runs, length, context in (
            *((1, 1, n) for n in (1024, 8192, 65536)),
            *((8, 1, 1024), (32, 1, 1024), (32, 1, 8192), (128, 1, 2048), (8, 5, 2048)),
            *((1, 1000, 1000), (1, 8192, 8192), (4, 2048, 16384)),
        ):
            width = -(-context // block)
            layers = max(1, min(8, int(SPAN / (2 * runs * context * kv_heads * dim * cache.itemsize))))
            shape = (layers, runs * width, kv_heads, block, dim)
            k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(cache) for _ in range(2))
            q = torch.randn(runs * length, heads, dim, device="cuda", dtype=torch.bfloat16)
            batch = PagedBatch(
                torch.arange(runs + 1, device="cuda", dtype=torch.int32) * length,
                torch.full((runs,), context, device="cuda", dtype=torch.int32),
                torch.randperm(runs * width, device="cuda").to(torch.int32).view(runs, width),
                *(runs * length, length, context),
            )
            calls = [
                partial(paged_attention, q, keys, values, [batch], 0.09, None)
                for keys, values in zip(k, v, strict=True)
            ]
            seconds = seconds_of(calls)
            found = {"kernel": f"attention {cache}", "shape": f"{runs} x {length} of {context}", "us": seconds * 1e6}
            if length <= 8:
                moved = 2 * runs * context * kv_heads * dim * cache.itemsize
                found["bandwidth"] = moved / seconds / limit["copy_bytes"]
            else:
                seen = length * (context - length) + length * (length + 1) / 2
                found["operations"] = 4 * runs * heads * dim * seen / seconds / limit["bf16_operations"]
            yield found


def row_speed(limit: dict[str, float]) -> Iterator[dict[str, Any]]:
    """What lies between the products, and the choice of a token."""
    bf16, n = torch.bfloat16, 4096
    weight = torch.ones(n, device="cuda", dtype=bf16)
    for rows in (1, 32, 4096):
        x, wide = (torch.randn(rows, m, device="cuda", dtype=bf16) for m in (n, 28672))
        qkv = torch.randn(rows, 48, 128, device="cuda", dtype=bf16)
        cos = torch.ones(rows, 1, 128, device="cuda", dtype=bf16)
        slots = torch.arange(rows, device="cuda", dtype=torch.int32)
        k = torch.zeros(rows // 16 + 1, 8, 16, 128, device="cuda", dtype=bf16)
        parts = qkv.split((32, 8, 8), dim=1)
        for name, call, moved in (
            ("rms_norm", partial(rms_norm, x, weight, 1e-5), 2 * x.nbytes),
            ("quantize_rows", partial(quantize_rows, x, torch.float8_e4m3fn), 1.5 * x.nbytes),
            ("gate_product", partial(gate_product, wide, "silu"), 1.5 * wide.nbytes),
            ("rotate_into_cache", partial(rotate_into_cache, *parts, cos, cos, slots, k, k), 2 * qkv.nbytes),
        ):
            seconds = seconds_of([call] * 20)
            share = moved / seconds / limit["copy_bytes"]
            yield {"kernel": name, "rows": rows, "us": seconds * 1e6, "bandwidth": share}
    for rows in (1, 32, 256):
        scores = torch.randn(rows, 128256, device="cuda") * 3
        for name, rule, typical in (
            ("greedy", DrawRule(0.0, 1.0, 0.0, 0, 0.5), 1.0),
            ("temperature", DrawRule(1.0, 1.0, 0.0, 0, 0.5), 1.0),
            ("top-k 50", DrawRule(0.7, 1.0, 0.0, 50, 0.5), 1.0),
            ("top-p 0.95", DrawRule(0.7, 0.95, 0.0, 0, 0.5), 1.0),
            ("top-k, top-p, min-p", DrawRule(0.7, 0.9, 0.05, 40, 0.5), 1.0),
            ("typical 0.9", DrawRule(1.0, 1.0, 0.0, 0, 0.5), 0.9),
        ):
            rules = twins.rules_of([rule] * rows, [typical] * rows, "cuda")
            seconds = seconds_of([partial(sampler.draw, scores, rules)] * 4)
            yield {"kernel": f"draw {name}", "rows": rows, "us": seconds * 1e6}
        masks = torch.full((rows, 4008), -1, device="cuda", dtype=torch.int32)
        of = torch.arange(rows, device="cuda", dtype=torch.int32)
        seconds = seconds_of([partial(penalties.restrict_bits, scores, masks, of)] * 4)
        yield {"kernel": "restrict_bits", "rows": rows, "us": seconds * 1e6}


def tune(limit: dict[str, float]) -> Iterator[dict[str, Any]]:
    """The best sizes of the products' programs: one line for each form, shape and number of rows."""
    vector, strip = product.vector_tile, product.strip_tile
    for form in ("bf16", "fp8"):
        for name in ("8B out", "8B down"):
            copies = matrices(form, SHAPES[name], gated=False)
            moved = copies[0].weights.nbytes
            for rows in (1, 8, 32):
                x = torch.randn(rows, copies[0].k, device="cuda", dtype=torch.bfloat16)
                found = []
                for tile in VECTOR_TILES if rows == 1 else STRIP_TILES:
                    tile = dict(zip(("BLOCK_N", "BLOCK_K", "STAGES", "num_warps"), tile, strict=True))
                    if rows > 1:
                        tile["BLOCK_M"] = max(16, rows)
                    product.vector_tile = product.strip_tile = partial(_given, tile)
                    try:
                        seconds = seconds_of([partial(product.multiply, m, x) for m in copies])
                    except Exception as error:  # more shared memory than there is
                        print(f"{form} {name} {rows} {tile}: {str(error)[:100]}", file=sys.stderr)
                        continue
                    finally:
                        product.vector_tile, product.strip_tile = vector, strip
                    found.append((moved / seconds / limit["copy_bytes"], tile))
                found.sort(key=lambda pair: -pair[0])
                best = [{"bandwidth": share, **tile} for share, tile in found[:3]]
                yield {"kernel": f"product {form}", "shape": name, "rows": rows, "best": best}


def _given(tile: dict[str, int], _matrix: product.DeviceMatrix, _rows: int) -> dict[str, int]:
    return tile


def main(seconds: float = 240, tuned: bool = False) -> dict[str, Any]:
    """Run everything within so many seconds. Returns limits, checks, and a record for each measurement."""
    begun = time.monotonic()
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "limits": limits()}
    print(json.dumps(result), flush=True)
    result["checks"] = correctness(seconds * 0.4)
    print(json.dumps(result["checks"]), flush=True)
    result["speed"], result["unfinished"] = [], []
    parts = [attention_speed, row_speed, product_speed, *([tune] if tuned else [])]
    for part in parts:
        try:
            for record in part(result["limits"]):
                result["speed"].append(record)
                print(json.dumps(record), flush=True)
                if time.monotonic() > begun + seconds:
                    result["unfinished"].append(part.__name__)
                    break
        except Exception:
            result["unfinished"].append(f"{part.__name__}: {traceback.format_exc()[-1500:]}")
            print(result["unfinished"][-1], file=sys.stderr)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--tune", action="store_true")
    asked = parser.parse_args()
    if asked.worker is not None:
        worker(*map(int, asked.worker.split("/")), asked.seconds)
        sys.exit(0)
    outcome = main(asked.seconds, asked.tune)
    if asked.json is not None:
        asked.json.write_text(json.dumps(outcome, indent=1))
    sys.exit(1 if outcome["checks"]["failed"] or outcome["checks"]["ended_badly"] else 0)
