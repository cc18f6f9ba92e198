"""Bytes of a model's weights in each format, and the format that a checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.errors import UsageError
from penstock.plan.shape import Shape


@dataclass(frozen=True)
class Packing:
    """How a format stores weights. bits: of a weight of the layers' matrices, scales included; head_bits, table_bits:
    of the output matrix and of the embedding; multiplies: the type of the products; kept: the type of everything else
    and of the cache."""

    bits: float
    head_bits: float
    table_bits: float
    multiplies: str
    kept: str = "bfloat16"


def _plain(bits: float, dtype: str) -> Packing:
    return Packing(bits, bits, bits, dtype, dtype)


# Scales of GPTQ and AWQ: 16 bits and a 4-bit zero point for each group of 128 weights. Bits of the K mixtures are those
# of llama.cpp's files of Llama 3 8B.
PACKINGS: dict[str, Packing] = {
    "float32": _plain(32, "float32"),
    "bfloat16": _plain(16, "bfloat16"),
    "float16": _plain(16, "float16"),
    "fp8": Packing(8, 16, 16, "fp8"),
    "int8": Packing(8, 8, 16, "int8"),
    "int4": Packing(4.5, 4.5, 16, "int8"),
    "gptq": Packing(4.16, 16, 16, "float16", "float16"),
    "awq": Packing(4.16, 16, 16, "float16", "float16"),
    "gptq-8bit": Packing(8.19, 16, 16, "float16", "float16"),
    "nf4": Packing(4.5, 16, 16, "bfloat16"),
    "mxfp4": Packing(4.25, 16, 16, "bfloat16"),
    "q8_0": Packing(8.5, 8.5, 8.5, "int8"),
    "q6_k": Packing(6.56, 6.56, 6.56, "int8"),
    "q5_k_m": Packing(5.67, 6.56, 5.5, "int8"),
    "q4_k_m": Packing(4.83, 6.56, 4.5, "int8"),
    "q4_0": Packing(4.5, 6.56, 4.5, "int8"),
}
HALVES = ("bfloat16", "float16")
_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
_KV_SIZES = {**_SIZES, "int8": 1, "fp8_e4m3fn": 1, "fp8_e5m2": 1}
_KV_SCALE = {"int8": 4}  # bytes beside each vector: of each token, layer and kv head, keys and values


def packing(name: str) -> Packing:
    """A format by its name. Raises UsageError."""
    if name not in PACKINGS:
        raise UsageError(f"There is no format {name[:40]!r}.", f"Formats: {', '.join(PACKINGS)}.")
    return PACKINGS[name]


def weight_bytes(shape: Shape, name: str) -> int:
    """Bytes of all weights, as a checkpoint of this format has them (a tied head once)."""
    form = packing(name)
    total = shape.matrices * form.bits + shape.embedding * form.table_bits + shape.other * 8 * _SIZES[form.kept]
    return int((total + (0 if shape.tied else shape.head * form.head_bits)) / 8)


def resident_bytes(shape: Shape, name: str, on_cpu: bool) -> int:
    """Bytes that the weights take once they are loaded: on processors a tied head is packed a second time, for the
    product, unless it is multiplied as it lies (float32)."""
    form = packing(name)
    again = shape.tied and on_cpu and form.kept != "float32"
    return weight_bytes(shape, name) + (int(shape.head * form.head_bits / 8) if again else 0)


def read_bytes(shape: Shape, name: str, tokens: int) -> float:
    """Bytes of weights that one step reads which computes `tokens` tokens, each choosing its experts by itself."""
    form = packing(name)
    share = 1.0
    if shape.experts and shape.chosen:
        share = 1 - (1 - shape.chosen / shape.experts) ** tokens  # of the experts at least one token chose
    apart = shape.matrices - shape.active  # experts that a single token leaves out
    one = shape.chosen / max(1, shape.experts)
    touched = shape.active + (apart * (share - one) / (1 - one) if 0 < one < 1 else 0.0)
    return (touched * form.bits + shape.head * form.head_bits) / 8


def kv_bytes_per_token(shape: Shape, name: str) -> int:
    """Bytes that the cache keeps of one token over all layers (before any window is full)."""
    return _kept_bytes(shape, name, shape.kv_values(1))


def kv_bytes(shape: Shape, name: str, tokens: int) -> int:
    """Bytes of the cache of one sequence of so many tokens."""
    return _kept_bytes(shape, name, shape.kv_values(tokens))


def _kept_bytes(shape: Shape, name: str, values: int) -> int:
    """Bytes of so many numbers in the cache, with their scales."""
    dtype = shape.kv_dtype or packing(name).kept
    vectors = 2 * shape.kv_heads * values // max(1, shape.kv_width)
    return values * _KV_SIZES[dtype] + vectors * _KV_SCALE.get(dtype, 0)


def stored_format(config: Mapping[str, Any]) -> str:
    """The format of the checkpoint that this config.json belongs to; bfloat16 where it does not say."""
    quantized = config.get("quantization_config")
    if isinstance(quantized, Mapping):
        method = str(quantized.get("quant_method", "")).lower()
        bits = quantized.get("bits", 4)
        if method in ("gptq", "awq") and bits == 8:
            return "gptq-8bit"
        if method in ("gptq", "awq", "fp8", "mxfp4"):
            return method
        if method.startswith("fbgemm_fp8") or "fp8" in method:
            return "fp8"
        if method == "bitsandbytes":
            return "nf4" if quantized.get("load_in_4bit") else "int8"
    text = config.get("text_config")
    inner = text.get("dtype") or text.get("torch_dtype") if isinstance(text, Mapping) else None
    dtype = str(config.get("dtype") or config.get("torch_dtype") or inner or "bfloat16").removeprefix("torch.")
    return dtype if dtype in _SIZES else "bfloat16"
