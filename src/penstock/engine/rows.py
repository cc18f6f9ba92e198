"""The running sequences as a device keeps them: each has a row with its blocks and its last token.

Only what is new travels there: tokens that the device did not choose itself, and blocks that a sequence was given
since. Everything else that a step needs is made there from these rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Numbers
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine.scheduler import Run
from penstock.engine.sequence import Sequence
from penstock.kernels.attention import PagedBatch, RunGroup
from penstock.models.inputs import StepInputs, Wanted
from penstock.models.lora import RowAdapters

UNKNOWN = -1  # in place of a token that only the device knows
_WIDTH = 16  # block tables are cut at multiples of this


@dataclass
class _Row:
    """blocks: the sequence's own, of which the device knows the first `sent`."""

    index: int
    blocks: array[int]
    sent: int = 0


@dataclass(frozen=True)
class Packed:
    """What the device is told for one step. numbers: [n] int64 on the host, read in the order of `split`.

    padded: runs with those that only fill up; width: blocks of the longest context, at least; longest: tokens of the
    longest run; single: how many of the runs, the first ones, have one token; partial: not every row is wanted.
    """

    numbers: Tensor
    sizes: tuple[int, ...]
    tokens: int
    padded: int
    single: int
    longest: int
    width: int
    partial: bool


class DeviceRows:
    """count: sequences that run together; width: blocks of the longest of them. The last row stands for padding."""

    def __init__(self, count: int, width: int, block_size: int, device: torch.device) -> None:
        self.count, self.width, self.block_size, self.device = count, width, block_size, device
        self.on_gpu = device.type != "cpu"
        self.tokens = torch.zeros(count + 1, dtype=torch.int64, device=device)
        self.tables = torch.zeros((count + 1, width), dtype=torch.int32, device=device)
        self._slots = torch.int64 if device.type == "cpu" else torch.int32
        self._numbers = torch.arange(count + 2, dtype=torch.int32, device=device)
        self._rows: dict[Sequence, _Row] = {}
        self._free = list(range(count - 1, -1, -1))

    def send(self, numbers: Numbers[float], dtype: torch.dtype = torch.int64) -> Tensor:
        """Numbers on the device, without waiting for it."""
        return torch.tensor(numbers, dtype=dtype, pin_memory=self.on_gpu).to(self.device, non_blocking=True)

    def forget(self, sequence: Sequence) -> None:
        """Give the row of a sequence to others; one that has none is fine."""
        row = self._rows.pop(sequence, None)
        if row is not None:
            self._free.append(row.index)

    def index_of(self, sequence: Sequence) -> int:
        """The row of a sequence that was packed."""
        return self._rows[sequence].index

    def pack(
        self,
        runs: list[Run],
        running: Iterable[Sequence],
        wanted: list[tuple[int, int]] | None = None,
        with_spans: bool = False,
        padded: int = 0,
    ) -> Packed:
        """Everything about a step that the device does not know.

        runs: those of one token first. running: sequences that keep their rows when there are too few. wanted: (row,
        run) whose results are needed; None for all rows. with_spans: see StepInputs. padded: runs of one token are
        made so many.
        """
        ids: list[int] = []
        index, contexts, lengths = [], [], []
        at: list[int] = []
        blocks: list[int] = []
        for run in runs:
            s, start = run.sequence, run.sequence.computed
            stop = start + run.length
            ids += s.ids[start:stop]
            if stop > len(s.ids):
                ids.append(UNKNOWN)
            index.append(self._place(s, at, blocks, running))
            contexts.append(stop)
            lengths.append(run.length)
        tokens, fill = len(ids), max(0, padded - len(runs))
        ends = wanted or []
        parts = (
            ids + [0] * fill,
            index + [self.count] * fill,
            contexts + [0] * fill,
            lengths,
            [run.sequence.span for run in runs] if with_spans else [],
            [row for row, _run in ends],
            [run for _row, run in ends],
            at,
            blocks,
        )
        numbers = [n for part in parts for n in part]
        host = torch.tensor(numbers, dtype=torch.int64, pin_memory=self.on_gpu)
        width = -(-max(contexts) // self.block_size)
        return Packed(
            numbers=host,
            sizes=tuple(map(len, parts)),
            tokens=tokens,
            padded=len(runs) + fill,
            single=sum(length == 1 for length in lengths),
            longest=max(lengths),
            width=min(self.width, -(-width // _WIDTH) * _WIDTH),
            partial=wanted is not None,
        )

    def _place(self, sequence: Sequence, at: list[int], blocks: list[int], running: Iterable[Sequence]) -> int:
        """The row of a sequence; what the device does not know of its blocks is added to `blocks`, and where it goes to
        `at`."""
        row = self._rows.get(sequence)
        if row is None:
            if not self._free:  # of preempted ones
                kept = set(running)
                for other in [s for s in self._rows if s not in kept]:
                    self.forget(other)
            row = self._rows[sequence] = _Row(self._free.pop(), sequence.blocks)
        if row.blocks is not sequence.blocks:
            row.blocks, row.sent = sequence.blocks, 0
        if row.sent < len(sequence.blocks):
            first = row.index * self.width
            at += range(first + row.sent, first + len(sequence.blocks))
            blocks += sequence.blocks[row.sent :]
            row.sent = len(sequence.blocks)
        return row.index

    def receive(self, packed: Packed) -> tuple[Tensor, ...]:
        """Send the numbers to the device and take the new blocks over. Returns ids, rows, contexts, lengths, spans, the
        wanted rows and their runs, each an int64 tensor there."""
        sent = packed.numbers.to(self.device, non_blocking=True)
        *parts, at, blocks = sent.split(packed.sizes)
        if len(at):
            self.tables.view(-1).index_copy_(0, at, blocks.int())
        return tuple(parts)

    def decoding(
        self,
        ids: Tensor,
        index: Tensor,
        contexts: Tensor,
        alone: bool = False,
        adapters: RowAdapters | None = None,
    ) -> StepInputs:
        """The inputs of runs of one token each, all of them wanted, for any contexts: this is captured.

        ids, index (of rows), contexts: [n]; a context of 0 is padding; alone, adapters: as of `mixed`.
        """
        n = len(ids)
        positions = (contexts - 1).clamp_min(0)
        tables = self.tables.index_select(0, index)
        blocks = tables.gather(1, (positions // self.block_size).unsqueeze(1)).squeeze(1)
        slots = blocks * self.block_size + positions % self.block_size
        return StepInputs(
            ids=torch.where(ids < 0, self.tokens[index], ids),
            positions=positions,
            spans=None,
            slots=torch.where(contexts > 0, slots, -1).int(),
            groups=self._groups(self._batch(self._numbers[: n + 1], contexts, tables, n, 1, alone)),
            adapters=adapters,
        )

    def mixed(
        self, packed: Packed, parts: tuple[Tensor, ...], alone: bool = False, adapters: RowAdapters | None = None
    ) -> StepInputs:
        """The inputs of runs of any length. parts: from `receive`; alone: the one run is of a deterministic request;
        adapters: of the rows."""
        ids, index, contexts, lengths, spans, rows, runs = parts
        stops = lengths.cumsum(0)
        starts = stops - lengths
        run = torch.repeat_interleave(self._numbers[: len(lengths)].long(), lengths, output_size=packed.tokens)
        token = torch.arange(packed.tokens, device=self.device)
        positions = token - (starts + lengths - contexts)[run]
        tables = self.tables[:, : packed.width].index_select(0, index)
        slots = tables[run, positions // self.block_size] * self.block_size + positions % self.block_size
        q_starts = torch.cat((starts[:1], stops)).int()
        one, total = packed.single, len(lengths)
        batches = []
        if one:
            batches.append(self._batch(q_starts[: one + 1], contexts[:one], tables[:one], one, 1, alone))
        if one < total:
            rest = packed.tokens - one
            batches.append(self._batch(q_starts[one:], contexts[one:], tables[one:], rest, packed.longest, alone))
        wanted = None
        if packed.partial:
            n = len(rows)
            ends = self._batch(self._numbers[: n + 1], contexts[runs], tables[runs], n, 1, alone)
            wanted = Wanted(rows, self._groups(ends) if n else [])
        return StepInputs(
            ids=torch.where(ids < 0, self.tokens[index][run], ids),
            positions=positions,
            spans=torch.maximum(spans[run], positions + 1) if len(spans) else None,
            slots=slots.to(torch.int32 if alone else self._slots),  # as in `decoding`, so that it may be either
            groups=self._groups(*batches),
            wanted=wanted,
            adapters=adapters,
        )

    def _groups(self, *batches: PagedBatch) -> list[RunGroup] | list[PagedBatch]:
        if self.device.type != "cpu":
            return list(batches)
        return [group for batch in batches for group in batch.groups(self.block_size)]

    def _batch(
        self, q_starts: Tensor, contexts: Tensor, tables: Tensor, rows: int, longest: int, alone: bool = False
    ) -> PagedBatch:
        reach = tables.shape[1] * self.block_size
        return PagedBatch(q_starts, contexts.int(), tables, rows, longest, reach, fixed_splits=alone)
