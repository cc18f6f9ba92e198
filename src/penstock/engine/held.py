"""Scores that wait for a mask: a grammar that takes long delays its own sequence and not the step.

A sequence whose mask is late is left out of the choice; it has nothing to compute, so the scheduler passes it over. Its
scores lie here until the mask is there.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from penstock.engine.sequence import Sequence

PATIENCE = 0.002  # seconds that a step waits for late masks


class HeldRows:
    """The last scores of sequences whose next token cannot be chosen yet."""

    def __init__(self) -> None:
        self._rows: dict[Sequence, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def sequences(self) -> list[Sequence]:
        return list(self._rows)

    def drop(self, sequence: Sequence) -> None:
        """Forget a sequence; one that is not held is fine."""
        self._rows.pop(sequence, None)

    def wait(self, seconds: float) -> None:
        """Sleep until the first of them may be ready, or for so long."""
        cursor = next(iter(self._rows)).cursor
        if cursor is not None:
            cursor.ready(seconds)

    def exchange(
        self, sequences: list[Sequence], logits: Tensor | None, patience: float
    ) -> tuple[list[Sequence], Tensor | None]:
        """The rows to choose now: those of this step whose mask is there or comes within `patience` seconds, and those
        that were held and are ready. The others are held. Nobody waits for what is known to be slow. A deterministic
        one is chosen alone: of several rows, sums may be made in another order.

        logits: [n, vocab], row i for sequences[i]; None where n is 0.
        """
        deadline = time.perf_counter() + patience
        on_time = []
        for i, sequence in enumerate(sequences):
            cursor = sequence.cursor
            if cursor is None or cursor.ready(0.0 if cursor.slow else deadline - time.perf_counter()):
                on_time.append(i)
                self._rows.pop(sequence, None)  # of before a preemption
        if len(on_time) == len(sequences) and not self._rows:
            return sequences, logits
        due = [s for s in self._rows if s not in sequences and (s.cursor is None or s.cursor.ready())]
        single = [s for s in due if s.request.deterministic]
        if any(s.request.deterministic for s in sequences):  # it has the step to itself
            due = []
        elif single:
            due, on_time = single[:1], []
        parts = [self._rows[s].unsqueeze(0) for s in due]
        if logits is not None:
            late = set(range(len(sequences))) - set(on_time)
            self._rows.update((sequences[i], logits[i].clone()) for i in sorted(late))
            parts.append(logits[on_time])
        return due + [sequences[i] for i in on_time], torch.cat(parts) if parts else None
