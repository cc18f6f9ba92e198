"""Compile all GPU kernels to machine code for a card that is not there: `python -m tests.kernels.triton_compile sm_90`.

Launches go nowhere; what they would have launched is compiled, with the same types and sizes, down to the code that a
card loads. Prints a JSON line for each variant: kernel, bytes of shared memory, registers, spilled bytes, how often
some instructions occur.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_80": GPUTarget("cuda", 80, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx90a": GPUTarget("hip", "gfx90a", 64),
}
_TOOLS = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
_COUNTED = ("wgmma.mma_async", "mma.sync", "cp.async.cg", "ld.global.v4", "atom", "v_mfma", "buffer_load_dwordx4")


class NoCard:
    """A driver that knows its target and nothing else."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def record(target: GPUTarget) -> dict[str, Any]:
    """From now on launches compile. Returns where the compiled kernels appear, by a name of the variant."""
    triton.runtime.driver.set_active(NoCard(target))
    torch.version.hip = "7.0" if target.backend == "hip" else None
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.setdefault(f"{self.__name__} {kernel.hash[:8]}", kernel)
        return kernel

    JITFunction.run = compile_only
    return compiled


def figures(name: str, kernel: Any) -> dict[str, Any]:
    """What the machine code of a variant takes."""
    found: dict[str, Any] = {"kernel": name.split()[0], "shared": kernel.metadata.shared}
    text = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    found |= {word: text.count(word) for word in _COUNTED if word in text}
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            usage = subprocess.run(
                [f"{_TOOLS}/cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
            ).stdout
        found |= {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    else:
        for key, word in (("REG", "vgpr_count"), ("STACK", "vgpr_spill_count")):
            found[key] = max(int(n) for n in re.findall(rf"\.{word}:\s+(\d+)", text))
    return found


def attention() -> None:
    """The shapes of Llama, of a small model with ALiBi and softcap, and an 8-bit cache."""
    from penstock.kernels.attention import PagedBatch
    from penstock.kernels.triton.attention import paged_attention
    from penstock.kernels.triton.rotary import rotate_into_cache

    def one(heads: int, kv_heads: int, dim: int, length: int, cache: torch.dtype | None = None, **options: Any) -> None:
        dtype = options.pop("dtype", torch.bfloat16)
        q = torch.empty(2 * length, heads, dim, dtype=dtype)
        k, v = (torch.empty(8, kv_heads, 16, dim, dtype=cache or dtype) for _ in range(2))
        starts = torch.tensor([0, length, 2 * length], dtype=torch.int32)
        contexts, table = torch.tensor([90, 91], dtype=torch.int32), torch.zeros(2, 8, dtype=torch.int32)
        scales = {} if cache is None else {"k_scale": torch.ones(kv_heads), "v_scale": torch.ones(kv_heads)}
        batch = PagedBatch(starts, contexts, table, 2 * length, length, 4096)
        paged_attention(q, k, v, [batch], 0.1, options.pop("window", None), **options, **scales)
        rows = (q, q[:, :kv_heads], q[:, :kv_heads], *(torch.ones(2 * length, 1, dim, dtype=dtype) for _ in range(2)))
        rotate_into_cache(*rows, torch.zeros(2 * length, dtype=torch.int32), k, v, **scales)

    for length in (1, 4, 500):
        one(32, 8, 128, length)
    one(28, 4, 128, 500, window=1024)
    one(16, 8, 256, 1, softcap=50.0, window=4096)
    one(16, 8, 256, 300, softcap=50.0, window=4096)
    one(32, 32, 80, 300, alibi=torch.zeros(32, 128))
    one(8, 2, 64, 1, dtype=torch.float32)
    one(8, 2, 64, 64, dtype=torch.float32, chunk=16)
    one(32, 8, 128, 1, torch.float8_e4m3fn)
    one(32, 8, 128, 500, torch.float8_e5m2)


def products() -> None:
    """A projection with residual or a gated MLP, in each form, at each number of rows that has code of its own."""
    from penstock.kernels.triton import product
    from penstock.kernels.triton.experts import expert_products, stack
    from penstock.kernels.triton.product import _few, pack

    if torch.version.hip is not None:
        product.fp8_type = lambda: torch.float8_e4m3fnuz
    for form in ("bf16", "fp8", "int8", "int4"):
        weight = torch.zeros(4096, 4096, dtype=torch.bfloat16)
        plain = pack(form, (weight,), (None,), None)
        gated = pack(form, (weight[:1024], weight[1024:2048]), (None, None), "silu")
        for rows in (1, 8, 64):
            x = torch.zeros(rows, 4096, dtype=torch.bfloat16)
            _few(plain, x, x) if rows == 8 else _few(gated, x, None)
        experts = [pack(form, (weight[:1024], weight[1024:2048]), (None, None), "silu") for _ in range(4)]
        made = stack(experts)
        assert made is not None
        for rows in (1, 128):
            chosen = torch.zeros(rows, 2, dtype=torch.int64)
            expert_products(made[0], torch.zeros(rows, 4096, dtype=torch.bfloat16), chosen)


def rows() -> None:
    """Norms, activations, the sampler and what changes scores."""
    from penstock.kernels.counts import PenaltyRules
    from penstock.kernels.triton import activation, norms, penalties, sampler

    for n in (128, 8192):
        x, weight = torch.zeros(4, n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.bfloat16)
        norms.norm(x, "rms", weight, eps=1e-5)
        norms.norm(x.view(4, 1, n), "layer", weight, weight, 1e-5)
        for narrow in (torch.int8, torch.float8_e4m3fn if torch.version.hip is None else torch.float8_e4m3fnuz):
            norms.norm(x, "none", narrow=narrow)
    for kind in sorted(set(activation.KINDS.values())):
        activation.gate_product(torch.zeros(4, 28672, dtype=torch.bfloat16), kind)
    zeros, whole = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    scores = torch.zeros(4, 128256, dtype=torch.bfloat16)
    sampler.draw(scores, sampler.SamplerRules(zeros, whole, zeros, zeros, zeros, zeros.double()))
    rules = PenaltyRules(whole, zeros, zeros, zeros, zeros, whole)
    penalties.penalize(scores.float(), rules, torch.zeros(4, 2, 128256, dtype=torch.int32))
    penalties.restrict_bits(scores, torch.zeros(4, 4008, dtype=torch.int32), whole)
    penalties.chosen_logprobs(scores, whole.long())
    penalties.count_tokens(torch.zeros(4, 2, 128256, dtype=torch.int32), whole, whole.long())


PARTS = {"attention": attention, "products": products, "rows": rows}


def main() -> None:
    target, *parts = sys.argv[1:]
    random.seed(0)
    compiled = record(TARGETS[target])
    for part in parts or PARTS:
        PARTS[part]()
    for name, kernel in compiled.items():
        print(json.dumps(figures(name, kernel)))


if __name__ == "__main__":
    main()
