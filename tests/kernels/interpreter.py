"""Triton 3.6's interpreter, where it computes something else than a card does.

Numbers of 8 and 16 bits that NumPy does not know are kept as integers: they were multiplied as such, and rounded
without the carry into the exponent. A bound of a loop was made from an array of one element, which NumPy 2.4 refuses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float64: torch.float64,
}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _converted(data: Any, source: Any, target: Any, _rounding: Any) -> Any:
    """Bits of one type as those of another, to nearest. data: any array of numbers of that width."""
    bits = torch.from_numpy(np.ascontiguousarray(data).view(f"i{data.itemsize}" if data.itemsize > 1 else np.uint8))
    values = bits.view(_TYPES[source]).to(_TYPES[target])
    return values.view(_BITS[values.element_size()]).numpy().view(f"u{values.element_size()}")


def _dot(self: Any, a: Any, b: Any, d: Any, _precision: Any, _imprecise: Any) -> Any:
    """Products of any type, summed in float32."""
    wide = [x.data.astype(np.float32) if x.dtype.scalar in (tl.float32, tl.float16) else _wide(x) for x in (a, b)]
    return interpreter.TensorHandle(np.matmul(*wide).astype(d.data.dtype) + d.data, d.dtype.scalar)


def _wide(x: Any) -> Any:
    if not x.dtype.scalar.is_floating():
        return x.data.astype(np.int64)
    return _converted(x.data, x.dtype.scalar, tl.float32, None).view(np.float32)


def repair() -> None:
    """Make the interpreter compute as a card does, for the life of this process."""
    interpreter._convert_float = _converted
    interpreter.InterpreterBuilder.create_dot = _dot
    patch = interpreter._patch_lang_tensor

    def patch_scalars(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_scalars
