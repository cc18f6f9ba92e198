"""Seconds of a step: what it must move and compute, against what a device moves and computes in a second.

The model of a decoding step is  max(bytes / bandwidth, operations / flops) + layers x seconds + rows x seconds, after
Williams, Waterman and Patterson, "Roofline" (2009), plus a share of the shorter of the two, which the longer does not
hide wholly; the seconds are fitted (`hardware.py` for cards; `cli/plan_here.py` in calls as this machine does them).
"""

from __future__ import annotations

from penstock.plan.hardware import Device
from penstock.plan.odd_shapes import ENCODER_DECODERS
from penstock.plan.shape import Shape
from penstock.plan.weights import kv_bytes, packing, read_bytes


def step_seconds(shape: Shape, form: str, device: Device, cards: int, batch: int, context: int) -> float:
    """Seconds of one decoding step of `batch` sequences that have `context` tokens each, on `cards` shards."""
    moved = read_bytes(shape, form, batch) + batch * kv_bytes(shape, form, context)
    products = 2.0 * batch * (shape.active + shape.head)
    scores = 4.0 * batch * shape.heads * shape.head_dim * _seen(shape, context)
    read = moved / _bandwidth(device, form)
    computed = (products + scores) / (_flops(device, form) * device.compute_share)
    between = shape.layers * (device.layer_seconds + (2 * device.exchange_seconds if cards > 1 else 0.0))
    busy = max(read, computed) + device.overlap_loss * min(read, computed)
    return busy / cards + between + batch * device.row_seconds


def prompt_seconds(shape: Shape, form: str, device: Device, cards: int, tokens: int) -> float:
    """Seconds until the first token of a prompt of so many tokens."""
    everything = shape.matrices if shape.family in ENCODER_DECODERS else shape.active
    products = 2.0 * tokens * everything + 2.0 * shape.head
    scores = 2.0 * tokens * shape.heads * shape.head_dim * _seen(shape, tokens)  # half of the square is masked
    computed = (products + scores) / (_flops(device, form) * device.prompt_share)
    read = read_bytes(shape, form, tokens) / _bandwidth(device, form)
    return max(read, computed) / cards + shape.layers * device.layer_seconds + device.row_seconds


def tokens_per_second(shape: Shape, form: str, device: Device, cards: int, batch: int, context: int) -> float:
    """Output tokens a second of `batch` sequences that decode side by side."""
    return batch / step_seconds(shape, form, device, cards, batch, context)


def _seen(shape: Shape, context: int) -> int:
    """Tokens that one token attends to, summed over the layers."""
    return sum(context if window is None else min(context, window) for window in shape.windows)


def _flops(device: Device, form: str) -> float:
    """Operations a second of a format's products; a type that the device lacks is multiplied in one that it has."""
    wanted = packing(form).multiplies
    for dtype in (wanted, "bfloat16", "float16", "float32"):
        if device.runs(dtype):
            return device.flops[dtype]
    return max(device.flops.values())


def _bandwidth(device: Device, form: str) -> float:
    """Bytes a second of weights and cache that a step of this format reads."""
    return device.bandwidth * device.read_share * device.type_share.get(packing(form).multiplies, 1.0)
