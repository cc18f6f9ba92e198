"""The C++ kernels of kernels/cpu: found, checked and called through ctypes; absent where nothing was compiled.

`LIBRARY` is chosen once, at import: the best level that this processor runs. PENSTOCK_CPU_KERNELS names another
(a key of _LEVELS) or a library's path, or switches them off (none). torch must be imported first: the library
then shares its OpenMP threads.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.devices.cpu import flags
from penstock.kernels.mask import Mask
from penstock.kernels.penalty import Penalty

_VERSION = 11
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
_AVX2 = {"avx2", "fma", "bmi2"}
_LEVELS = {
    "v4bf16": {*_AVX512, "avx512_bf16", "avx512_vnni"},
    "v4vnni": {*_AVX512, "avx512_vnni"},
    "v4": _AVX512,
    "v3vnni": {*_AVX2, "avx_vnni"},
    "v3": _AVX2,
    "dotprod": {"asimddp"},
    "generic": set[str](),
}
MAX_HEAD_DIM = 256
_SHORT = 8  # tokens of a run; longer ones are worth packing keys for

_int, _float, _pointer = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class _Rule(ctypes.Structure):
    """penstock_rule of kernels/cpu/attention.h."""

    _fields_ = (
        ("scale", _float),
        ("softcap", _float),
        ("window", _int),
        ("chunk", _int),
        ("alibi", _pointer),
        ("alibi_stride", _int),
    )


_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_OVER_BYTES = {dtype: f"{suffix}_int8" for dtype, suffix in _SUFFIX.items()}  # a cache of signed bytes


def _load() -> ctypes.CDLL | None:
    """The library of the best level that is installed and that the processor runs."""
    asked = os.environ.get("PENSTOCK_CPU_KERNELS", "")
    if os.sep in asked:
        return _declare(ctypes.CDLL(asked))
    have = flags()
    for level, needed in _LEVELS.items():
        if asked not in ("", level) or not needed <= have:
            continue
        # beside this file in an installed package; among the built files when the sources are installed editable
        for folder in (Path(__file__).parent, Path(sysconfig.get_path("platlib"), "penstock", "kernels")):
            try:
                library = ctypes.CDLL(str(folder / f"libpenstock_cpu_{level}.so"))
            except OSError:
                continue
            if library.penstock_kernels_version() == _VERSION:
                return _declare(library)
    return None


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    attention = [_pointer] * 5 + [_int, _pointer] + [_int] * 6 + [ctypes.POINTER(_Rule)]
    for suffix in (*_SUFFIX.values(), *_OVER_BYTES.values()):
        for name in ("attention", "attention_long"):
            function = getattr(library, f"penstock_{name}_{suffix}")
            function.argtypes, function.restype = attention, None
        function = getattr(library, f"penstock_rotary_kv_{suffix}")
        function.argtypes, function.restype = [_pointer, _int] * 3 + [_pointer] * 6 + [_int] * 5, None
    for suffix in _SUFFIX.values():
        function = getattr(library, f"penstock_restrict_{suffix}")
        function.argtypes, function.restype = [_pointer] + [_int] * 2 + [_pointer] * 3, None
    library.penstock_rms_norm_bf16.argtypes = [_pointer, _int, _pointer, _pointer, _int, _int, _float]
    library.penstock_rms_norm_bf16.restype = None
    library.penstock_layer_norm_bf16.argtypes = [_pointer, _int, *[_pointer] * 3, _int, _int, _float]
    library.penstock_layer_norm_bf16.restype = None
    library.penstock_gelu_bf16.argtypes, library.penstock_gelu_bf16.restype = [_pointer] * 2 + [_int] * 2, None
    library.penstock_argmax_bf16.argtypes = [_pointer] * 3 + [_int] * 2
    library.penstock_argmax_bf16.restype = None
    library.penstock_draw_f32.argtypes, library.penstock_draw_f32.restype = [_pointer] * 4 + [_int] * 2, None
    library.penstock_penalize_f32.argtypes = [_pointer] * 2 + [_int] * 2
    library.penstock_penalize_f32.restype = None
    return library


LIBRARY = _load()


def _by_type(name: str) -> dict[torch.dtype, Any]:
    """A function of each type that the kernels know; empty where nothing is compiled."""
    if LIBRARY is None:
        return {}
    return {dtype: getattr(LIBRARY, f"penstock_{name}_{suffix}") for dtype, suffix in _SUFFIX.items()}


def _by_cache(name: str) -> dict[tuple[torch.dtype, torch.dtype], Any]:
    """The same of functions over a cache, by the types of queries and cache."""
    if LIBRARY is None:
        return {}
    bytes_ = {(dtype, torch.int8): f"penstock_{name}_{suffix}" for dtype, suffix in _OVER_BYTES.items()}
    plain = {(dtype, dtype): f"penstock_{name}_{suffix}" for dtype, suffix in _SUFFIX.items()}
    return {types: getattr(LIBRARY, symbol) for types, symbol in (plain | bytes_).items()}


_SHORT_RUNS, _LONG_RUNS, _ROTARY = _by_cache("attention"), _by_cache("attention_long"), _by_cache("rotary_kv")
_RESTRICT = _by_type("restrict")


def can_attend(q: Tensor, cache: Tensor) -> bool:
    """Whether `attend` takes these: a type and a head size that the kernels know, laid out densely."""
    return (
        q.device.type == "cpu"
        and (q.dtype, cache.dtype) in _SHORT_RUNS
        and q.shape[-1] <= MAX_HEAD_DIM
        and q.is_contiguous()
        and cache.is_contiguous()
    )


@functools.lru_cache(maxsize=256)
def _rule(
    scale: float, window: int | None, softcap: float | None, chunk: int | None, table: int | None, stride: int
) -> _Rule:
    return _Rule(scale, softcap or 0.0, window or 0, chunk or 0, table, stride)


def attend(
    q: Tensor,
    out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tables: Tensor,
    contexts: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    chunk: int | None = None,
    alibi: Tensor | None = None,
) -> None:
    """Attention of runs of one length, written to `out`. Only what `can_attend` allows.

    q, out: [batch * length, heads, dim]; caches: [blocks, kv_heads, block_size, dim], of q's type or as
    kernels.byte_cache has them; tables: [batch, n] int64 block ids; contexts: [batch] int64, for each run the tokens
    that its last query sees. The rest is as kernels.attention has it. tables, contexts and the rows of alibi are
    contiguous.
    """
    kv_heads, block_size = k_cache.shape[1:3]
    rows, heads, dim = q.shape
    batch, width = tables.shape
    length = rows // batch
    table, stride = (None, 0) if alibi is None else (alibi.data_ptr(), alibi.stride(0))
    (_SHORT_RUNS if length <= _SHORT else _LONG_RUNS)[q.dtype, k_cache.dtype](
        *(q.data_ptr(), out.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()),
        *(tables.data_ptr(), width, contexts.data_ptr(), batch, length, heads, kv_heads, block_size, dim),
        _rule(scale, window, softcap, chunk, table, stride),
    )


def can_rotate(q: Tensor, cos: Tensor, cache: Tensor) -> bool:
    """Whether `rotate_into` takes these: one type that the kernels know, heads that lie together."""
    dim = q.shape[-1]
    return (
        q.device.type == "cpu"
        and (q.dtype, cache.dtype) in _ROTARY
        and q.dtype == cos.dtype
        and dim == cos.shape[-1] <= MAX_HEAD_DIM
        and dim % 2 == 0
        and cache.is_contiguous()
    )


def rotate_into(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """Turn q and k by their angles; k and v go into the cache at `slots`. Only what `can_rotate` allows.

    q: [T, heads, dim]; k, v: [T, kv_heads, dim]; cos, sin: [T, 1, dim]; slots: [T] int64; caches: [blocks, kv_heads,
    block_size, dim], of q's type or as kernels.byte_cache has them. Returns the turned q, contiguous.
    """
    tokens, heads, dim = q.shape
    q, k, v = _dense_heads(q, dim), _dense_heads(k, dim), _dense_heads(v, dim)
    cos, sin, slots = cos.contiguous(), sin.contiguous(), slots.contiguous()
    out = q.new_empty(tokens, heads, dim)
    _ROTARY[q.dtype, k_cache.dtype](
        *(q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
        *(cos.data_ptr(), sin.data_ptr(), slots.data_ptr(), out.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr()),
        *(tokens, heads, k.shape[1], dim, k_cache.shape[2]),
    )
    return out


def _dense_heads(x: Tensor, dim: int) -> Tensor:
    return x if x.stride(2) == 1 and x.stride(1) == dim else x.contiguous()


def can_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` and `layer_norm` take these."""
    return LIBRARY is not None and x.dtype == weight.dtype == torch.bfloat16


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis. x: [..., n] bfloat16; weight: [n]. Returns a contiguous tensor."""
    n, x = x.shape[-1], x.contiguous()
    out = torch.empty_like(x)
    assert LIBRARY is not None  # noqa: S101 (can_norm)
    LIBRARY.penstock_rms_norm_bf16(x.data_ptr(), n, weight.data_ptr(), out.data_ptr(), x.numel() // n, n, eps)
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean(x)) / std(x) * weight + bias over the last axis. Shapes and types as of `rms_norm`."""
    n, x = x.shape[-1], x.contiguous()
    out = torch.empty_like(x)
    assert LIBRARY is not None  # noqa: S101 (can_norm)
    LIBRARY.penstock_layer_norm_bf16(
        *(x.data_ptr(), n, weight.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr()),
        *(x.numel() // n, n, eps),
    )
    return out


def can_gelu(x: Tensor) -> bool:
    """Whether `gelu` takes these."""
    return LIBRARY is not None and x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.is_contiguous()


def gelu(x: Tensor, tanh: bool) -> Tensor:
    """torch.nn.functional.gelu; tanh: its approximation. Only what `can_gelu` allows."""
    out = torch.empty_like(x)
    assert LIBRARY is not None  # noqa: S101 (can_gelu)
    LIBRARY.penstock_gelu_bf16(x.data_ptr(), out.data_ptr(), x.numel(), tanh)
    return out


def can_find_largest(x: Tensor) -> bool:
    """Whether `largest` takes these rows."""
    return LIBRARY is not None and x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] > 0


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row, float32, and its place, the first of equal ones. NaN where a row has one. x: [n, m]."""
    values, ids = x.new_empty(len(x), dtype=torch.float32), x.new_empty(len(x), dtype=torch.int64)
    assert LIBRARY is not None  # noqa: S101 (can_find_largest)
    LIBRARY.penstock_argmax_bf16(x.data_ptr(), ids.data_ptr(), values.data_ptr(), *x.shape)
    return values, ids


def can_restrict(x: Tensor) -> bool:
    """Whether `restrict` takes these rows."""
    return x.dtype in _RESTRICT and x.is_contiguous()


def restrict(x: Tensor, masks: Sequence[Mask | None], withheld: Sequence[Sequence[int]]) -> None:
    """kernels.sampling.restrict. Only what `can_restrict` allows. x: [n, vocab]; masks, withheld: n of each."""
    n = len(masks)
    bounds = (_int * (n + 1))(0, *itertools.accumulate(map(len, withheld))) if any(withheld) else (_int * (n + 1))()
    _RESTRICT[x.dtype](
        x.data_ptr(),
        *x.shape,
        (_pointer * n)(*[None if mask is None else mask.address for mask in masks]),
        (_int * bounds[-1])(*itertools.chain.from_iterable(withheld)),
        bounds,
    )


class _Penalty(ctypes.Structure):
    """penstock_penalty of kernels/cpu/sampling.cpp."""

    _fields_ = (
        ("ids", _pointer),
        ("often", _pointer),
        ("made", _pointer),
        ("count", _int),
        ("repetition", _float),
        ("frequency", _float),
        ("length", _float),
        ("each", _float),
        ("once", _float),
    )


def can_penalize(x: Tensor) -> bool:
    """Whether `penalize` takes these rows."""
    return LIBRARY is not None and x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()


def penalize(x: Tensor, penalties: Sequence[Penalty | None]) -> None:
    """kernels.sampling.penalize. Only what `can_penalize` allows. x: [n, vocab]."""
    given = (_Penalty * len(penalties))()
    for place, penalty in zip(given, penalties, strict=True):
        if penalty is not None:
            tally, addresses = penalty.tally, penalty.tally.addresses
            place.ids, place.often, place.made, place.count = *addresses, tally.count
            place.repetition, place.frequency, place.length = penalty.repetition, penalty.frequency, tally.length
            place.each, place.once = penalty.each, penalty.once
    assert LIBRARY is not None  # noqa: S101 (can_penalize)
    LIBRARY.penstock_penalize_f32(x.data_ptr(), given, *x.shape)


class _Draw(ctypes.Structure):
    """penstock_draw of kernels/cpu/sampling.cpp."""

    _fields_ = (
        ("temperature", _float),
        ("top_p", _float),
        ("min_p", _float),
        ("top_k", _int),
        ("at", ctypes.c_double),
    )


def can_draw(x: Tensor) -> bool:
    """Whether `draw` takes these rows."""
    return LIBRARY is not None and x.dtype == torch.float32 and x.is_contiguous() and x.shape[1] > 0


def draw(x: Tensor, rules: Sequence[tuple[float, float, float, int, float]]) -> tuple[Tensor, Tensor]:
    """kernels.sampling.draw. Only what `can_draw` allows. rules: n of (temperature, top_p, min_p, top_k, at)."""
    ids, logprobs = x.new_empty(len(x), dtype=torch.int64), x.new_empty(len(x))
    assert LIBRARY is not None  # noqa: S101 (can_draw)
    LIBRARY.penstock_draw_f32(
        x.data_ptr(), (_Draw * len(x))(*(_Draw(*rule) for rule in rules)), ids.data_ptr(), logprobs.data_ptr(), *x.shape
    )
    return ids, logprobs
