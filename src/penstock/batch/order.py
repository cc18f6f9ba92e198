"""The order of prompts in which what they share is computed once.

Sorted by their tokens, prompts with a common beginning are neighbours. The first that has a beginning computes it; the
others wait until it is in the engine's prefix cache. Prompts that started side by side would each compute it.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

WORTH = 32  # shared tokens that are worth waiting for


def share_order(prompts: Sequence[Sequence[int]]) -> list[tuple[int, int | None]]:
    """(index, leader) of every prompt in the order to start them.

    leader: the index of an earlier prompt, whose own must be computed before this one starts; None for a prompt that
    shares less than WORTH tokens with all before it. It is the earliest that shares as much as any, so that many
    prompts wait for one, and none for a chain.
    """
    keys = [_sortable(prompt) for prompt in prompts]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    plan: list[tuple[int, int | None]] = []
    open_prefixes: list[tuple[int, int]] = []  # (length, first prompt that has it), growing
    before = b""
    for index in order:
        length = _common(before, keys[index])
        first = index
        while open_prefixes and open_prefixes[-1][0] > length:
            _, first = open_prefixes.pop()
        leader = None
        if length >= WORTH:
            if not open_prefixes or open_prefixes[-1][0] < length:
                open_prefixes.append((length, first))
            leader = open_prefixes[-1][1]
        plan.append((index, leader))
        before = keys[index]
        open_prefixes.append((len(prompts[index]) + 1, index))  # itself, longer than what any other can share
    return plan


def _sortable(ids: Sequence[int]) -> bytes:
    """The ids as bytes that compare as the ids do, four for each."""
    packed = array("I", [min(max(i, 0), 2**32 - 1) for i in ids] if _odd(ids) else ids)
    if sys.byteorder == "little":
        packed.byteswap()
    return packed.tobytes()


def _odd(ids: Sequence[int]) -> bool:
    """Whether the ids are none that an engine takes; it says so later."""
    return bool(ids) and (min(ids) < 0 or max(ids) >= 2**32)


def _common(a: bytes, b: bytes) -> int:
    """How many ids two packed prompts have in common at their beginning."""
    low, high = 0, min(len(a), len(b)) // 4
    while low < high:
        middle = (low + high + 1) // 2
        if a[: 4 * middle] == b[: 4 * middle]:
            low = middle
        else:
            high = middle - 1
    return low
