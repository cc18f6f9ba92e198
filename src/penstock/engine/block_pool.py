"""Blocks of the KV cache: reference counts, and an index of full blocks by what they hold.

Invariant: free + cached + used == total. A used block is held by at least one sequence; a cached one by none, but its
contents are still indexed and it is handed out last; a free one holds nothing worth keeping.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def block_key(parent: bytes, token_ids: Sequence[int], media: bytes = b"") -> bytes:
    """Key of a full block: SHA-256 over the key of everything before it, the tokens in it, and what media its
    placeholder tokens stand for."""
    return hashlib.sha256(parent + array("q", token_ids).tobytes() + media).digest()


def root_key(*parts: bytes) -> bytes:
    """Key of the empty prefix under a salt, an adapter and so on. Length-prefixed parts: no two lists collide."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


class BlockPool:
    """Hands out block ids, counts who holds them, finds blocks that already hold a wanted prefix."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._refs = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # the last freed goes out first: its pages are warm
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._index: dict[bytes, int] = {}

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    def counts(self) -> tuple[int, int, int]:
        """(free, cached, used); they add up to the total."""
        free, cached = len(self._free), len(self._cached)
        return free, cached, self.num_blocks - free - cached

    def allocate(self, n: int) -> list[int] | None:
        """n blocks for one holder, or None when there are not so many. Forgets the oldest cached contents first."""
        if n > self.available:
            return None
        blocks = []
        for _ in range(n):
            if self._free:
                block = self._free.pop()
            else:
                block, _none = self._cached.popitem(last=False)
                self._forget(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def match(self, keys: Sequence[bytes]) -> list[int]:
        """The longest run of indexed blocks for a chain of keys; the caller holds each of them from now on."""
        blocks = []
        for key in keys:
            block = self._index.get(key)
            if block is None:
                break
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1
            blocks.append(block)
        return blocks

    def publish(self, block: int, key: bytes) -> None:
        """Index a full block that its holder will not change any more. The first block of a key stays."""
        if key not in self._index and self._keys[block] is None:
            self._index[key] = block
            self._keys[block] = key

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one hold on each block. The last of a sequence goes first into the cache: prefixes live longest."""
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise RuntimeError(f"block {block} was released twice")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._keys[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def forget(self, blocks: Sequence[int]) -> list[int]:
        """Take the blocks that have one holder out of the index, because their contents are no good; returns them."""
        alone = [block for block in blocks if self._refs[block] == 1]
        for block in alone:
            self._forget(block)
        return alone

    def _forget(self, block: int) -> None:
        key = self._keys[block]
        if key is not None:
            del self._index[key]
            self._keys[block] = None
