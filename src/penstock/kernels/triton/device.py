"""What a launch has to know of the card."""

from __future__ import annotations

from functools import cache

import torch

_TYPICAL = 132  # multiprocessors, where there is no card to ask (the interpreter)


def rocm() -> bool:
    """Whether this PyTorch drives AMD's cards: 64 KiB of shared memory a program, which the tile sizes mind."""
    return torch.version.hip is not None


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a card."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else _TYPICAL


def fp8_type() -> torch.dtype:
    """The 8-bit float that the card's matrix units take: OCP's, or with AMD's CDNA 3 the one without infinities."""
    if rocm() and torch.cuda.is_available() and "gfx94" in torch.cuda.get_device_properties(0).gcnArchName:
        return torch.float8_e4m3fnuz
    return torch.float8_e4m3fn


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
