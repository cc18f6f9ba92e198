"""Who computes how many tokens in the next step.

There is no prefill phase and no decode phase: a step hands out a token budget, one token to every sequence that is
decoding, the rest to prompts in order, in chunks. When blocks run out the youngest sequence gives its own back and
waits again; it then is a fresh request with a longer prompt.

A deterministic sequence has its steps to itself, in turn with the step of all others: what it computes then depends on
nobody. Its prompt is cut at the same places whatever the budget, and what follows goes token by token, also when it is
computed again.
"""

from __future__ import annotations

import bisect
import time
from array import array
from collections import deque
from dataclasses import dataclass

from penstock.engine.block_pool import BlockPool
from penstock.engine.sequence import Sequence

ALONE = 64  # tokens of a deterministic sequence's prompt in one step


@dataclass(frozen=True)
class Run:
    """`length` tokens of a sequence to compute, from its `computed` on."""

    sequence: Sequence
    length: int

    @property
    def context(self) -> int:
        """Tokens that are known to the cache when the run is computed."""
        return self.sequence.computed + self.length

    @property
    def blocks(self) -> array[int]:
        return self.sequence.blocks

    @property
    def reaches_end(self) -> bool:
        """Whether the run ends at the last token there is, so that the next one can be chosen."""
        return self.context == len(self.sequence.ids) + self.sequence.ahead


class Scheduler:
    """Waiting and running sequences, and the pool they share.

    budget: tokens a step may compute. max_running: sequences that run together.
    """

    def __init__(self, pool: BlockPool, budget: int, max_running: int, prefix_caching: bool) -> None:
        self.pool, self.budget, self.max_running, self.prefix_caching = (
            pool,
            budget,
            max_running,
            prefix_caching,
        )
        self.waiting: list[Sequence] = []  # both kept in `order`
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._turns: deque[Sequence | None] = deque()  # deterministic ones, and None for all others; empty without any

    def add(self, sequence: Sequence) -> None:
        if sequence.request.deterministic and sequence not in self._turns:
            self._turns.extend((sequence,) if self._turns else (None, sequence))
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and take its blocks back."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.drop_blocks(self.pool)
        if sequence in self._turns:
            self._turns.remove(sequence)
            if len(self._turns) == 1:
                self._turns.clear()

    def next(self) -> list[Run]:
        """The runs of one step, oldest sequence first. Empty when nothing waits or runs; or now and then when nothing
        but a deterministic sequence does."""
        if self._turns:
            alone = self._alone()
            if alone is not None:
                return [alone]
        runs: list[Run] = []
        budget = self.budget
        decoding = sum(s.pending == 1 for s in self.running)  # each keeps one token of the budget
        i = 0
        while i < len(self.running):
            sequence = self.running[i]
            if self._turns and sequence in self._turns:
                i += 1
                continue
            if sequence.pending == 1:
                decoding -= 1
                length = min(1, budget)
            else:
                length = min(sequence.pending, budget - decoding)
            if length > 0 and self._make_room(sequence, length):
                runs.append(Run(sequence, length))
                budget -= length
            i += 1
        self._admit(runs, budget)
        return runs

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Blocks for a run, preempting younger sequences as needed; False when the sequence itself had to go."""
        while not sequence.grow(self.pool, sequence.computed + length):
            victim = self.running[-1]
            self.running.pop()
            victim.drop_blocks(self.pool)
            self.add(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        return True

    def _admit(self, runs: list[Run], budget: int) -> None:
        """Start waiting sequences in order while budget, rows and blocks last; the first that cannot start ends it."""
        while self.waiting and budget > 0 and len(self.running) < self.max_running:
            sequence = self.waiting[0]
            if self._turns and sequence in self._turns:  # it starts when it is its turn
                return
            if self.prefix_caching and not sequence.request.reads_prompt:
                sequence.take_prefix(self.pool)
            length = min(sequence.pending, budget)
            if sequence.computed + length < max(sequence.encoded, sequence.whole):  # that is read in one step
                sequence.drop_blocks(self.pool)
                return
            if not self._start(sequence, length):
                return
            runs.append(Run(sequence, length))
            budget -= length

    def _start(self, sequence: Sequence, length: int) -> bool:
        """Let the first that waits run, with room for a run of it; False when there is none."""
        # room for all that is known and for the others to grow by a block, so that a sequence is not started only
        # to be preempted half way
        known = -(-len(sequence.ids) // self.pool.block_size) - len(sequence.blocks)
        growing = sum(s.may_grow(self.pool.block_size) for s in self.running)
        if known + growing > self.pool.available or not sequence.grow(self.pool, sequence.computed + length):
            sequence.drop_blocks(self.pool)
            return False
        self.waiting.pop(0)
        bisect.insort(self.running, sequence, key=lambda s: s.order)
        if sequence.started is None:
            sequence.started = time.monotonic()
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_length)
        return True

    def _alone(self) -> Run | None:
        """The run of the deterministic sequence whose turn it is; None when it is the turn of all others."""
        for _ in range(len(self._turns)):
            self._turns.rotate(-1)
            sequence = self._turns[-1]
            if sequence is None:
                return None
            start, stop = sequence.computed, sequence.prompt_length
            length = min(ALONE - start % ALONE, stop - start) if start < stop else 1
            length = max(length, sequence.encoded - start, sequence.whole - start)  # what is read in one step
            if sequence.pending < length:  # its next token is not known yet
                continue
            if self.waiting and sequence is self.waiting[0]:
                if len(self.running) < self.max_running and self._start(sequence, length):
                    return Run(sequence, length)
            elif sequence not in self.waiting and self._make_room(sequence, length):
                return Run(sequence, length)
        return None
