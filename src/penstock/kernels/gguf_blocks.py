"""The quantized blocks of GGUF files, back to numbers.

Formats and their arithmetic: ggml's block types. The order of operations is that of the reference in the `gguf`
package, so that the results are equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dequantize(kind: str, blocks: Tensor) -> Tensor:
    """The weights in blocks of one kind (a key of BLOCKS). blocks: [n, bytes] uint8 -> [n, elements] float32."""
    return _KINDS[kind](blocks).reshape(len(blocks), BLOCKS[kind][0])


def _half(x: Tensor) -> Tensor:
    """Pairs of bytes as float16. [n, 2 k] uint8 -> [n, k] float32."""
    return x.contiguous().view(torch.float16).float()


def _nibbles(x: Tensor) -> Tensor:
    """All low halves of the last axis, then all high ones. [..., k] uint8 -> [..., 2, k]."""
    return torch.stack((x & 15, x >> 4), dim=-2)


def _bits(x: Tensor, width: int) -> Tensor:
    """Each byte of the last axis cut into numbers of `width` bits: all lowest ones, then all second ones ...

    [..., k] uint8 -> [..., 8/width, k].
    """
    shifts = torch.arange(0, 8, width, dtype=torch.uint8).unsqueeze(1)
    return (x.unsqueeze(-2) >> shifts) & (2**width - 1)


def _fifth_bits(x: Tensor) -> Tensor:
    """The bits of four bytes, each worth 16. [n, 4] uint8 -> [n, 32]."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return (((x.unsqueeze(-1) >> shifts) & 1) << 4).reshape(len(x), 32)


def _q8_0(x: Tensor) -> Tensor:
    return x[:, 2:].contiguous().view(torch.int8).float() * _half(x[:, :2])


def _q4_0(x: Tensor) -> Tensor:
    return _half(x[:, :2]) * (_nibbles(x[:, 2:]).flatten(1).float() - 8)


def _q4_1(x: Tensor) -> Tensor:
    return _half(x[:, :2]) * _nibbles(x[:, 4:]).flatten(1).float() + _half(x[:, 2:4])


def _q5_0(x: Tensor) -> Tensor:
    q = _nibbles(x[:, 6:]).flatten(1) | _fifth_bits(x[:, 2:6])
    return _half(x[:, :2]) * (q.float() - 16)


def _q5_1(x: Tensor) -> Tensor:
    q = _nibbles(x[:, 8:]).flatten(1) | _fifth_bits(x[:, 4:8])
    return _half(x[:, :2]) * q.float() + _half(x[:, 2:4])


def _scales(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and offset of the eight parts of a block of 256: 6 bits each, in 12 bytes. [n, 16] uint8 -> two [n, 8, 1].

    x: two float16 factors, then four bytes of scales, four of offsets (6 bits and the top two of another each), and
    four with the low halves of the last four of both.
    """
    first, second, mixed = x[:, 4:8], x[:, 8:12], x[:, 12:16]
    scale = torch.cat((first & 63, (mixed & 15) | ((first >> 2) & 48)), dim=1)
    offset = torch.cat((second & 63, (mixed >> 4) | ((second >> 2) & 48)), dim=1)
    return (_half(x[:, :2]) * scale.float()).unsqueeze(2), (_half(x[:, 2:4]) * offset.float()).unsqueeze(2)


def _q4_k(x: Tensor) -> Tensor:
    scale, offset = _scales(x)
    q = _nibbles(x[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return scale * q.float() - offset


def _q5_k(x: Tensor) -> Tensor:
    scale, offset = _scales(x)
    low = _nibbles(x[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    q = low | (_bits(x[:, 16:48], 1) << 4)
    return scale * q.float() - offset


def _q6_k(x: Tensor) -> Tensor:
    scale = _half(x[:, 208:]) * x[:, 192:208].contiguous().view(torch.int8).float()  # of 16 weights each
    low = _nibbles(x[:, :128].reshape(-1, 2, 64)).reshape(-1, 16, 16)
    high = _bits(x[:, 128:192].reshape(-1, 2, 32), 2).reshape(-1, 16, 16)
    return scale.unsqueeze(2) * ((low | (high << 4)).float() - 32)


BLOCKS = {  # elements and bytes of a block
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
