"""What this processor can do for PyTorch."""

from __future__ import annotations

import contextlib
import mmap
from functools import cache
from math import prod

import torch

from penstock.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fast_bfloat16() -> bool:
    """Whether matrix products in bfloat16 run natively (AVX512_BF16, AMX or the like)."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and any("bf16" in flag for flag in flags())


def choose_dtype(asked: str, checkpoint: str | None, packed: bool, quantized: bool) -> tuple[torch.dtype, str]:
    """The data type to compute in, and why.

    asked: auto, float32, bfloat16 or float16; checkpoint: the type that config.json names; packed: whether there are
    products of our own, which take bfloat16 on any processor; quantized: whether the matrices are in fewer bits.
    `auto` takes bfloat16 where that is fast and loses nothing that the checkpoint or the matrices have, else float32.
    """
    if asked != "auto":
        if asked not in DTYPES:
            raise UsageError(f"unknown dtype {asked!r}", hint=f"choose one of auto, {', '.join(DTYPES)}")
        return DTYPES[asked], "asked for"
    if quantized and packed:
        return torch.bfloat16, "what quantized matrices multiply"
    if checkpoint not in ("bfloat16", "float16"):
        return torch.float32, f"the checkpoint is {checkpoint or 'of unstated type'}"
    if fast_bfloat16():
        return torch.bfloat16, f"the checkpoint is {checkpoint} and the processor has bf16"
    if packed:
        return torch.bfloat16, f"the checkpoint is {checkpoint} and half the bytes are read faster"
    return torch.float32, "the processor has no fast bf16"


def zeros_on_demand(shape: tuple[int, ...], dtype: torch.dtype, huge: bool = False) -> torch.Tensor:
    """A zeroed tensor whose pages the system gives when they are first touched.

    torch.zeros writes every page at once: seconds of start-up, and memory held that nobody uses yet. huge: take pages
    of 2 MiB, for what is read whole again and again; looking up where small ones lie takes some per cent of the time.
    """
    size = prod(shape) * dtype.itemsize
    if size == 0:
        return torch.zeros(shape, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


@cache
def flags() -> frozenset[str]:
    """The processor's features as the kernel names them (avx2, avx512f, bf16 ...); empty where it does not tell."""
    try:
        with open("/proc/cpuinfo") as file:
            line = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())
