"""From scheduled runs to the tensors of one step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from penstock.engine.scheduler import Run
from penstock.kernels.attention import RunGroup
from penstock.models.inputs import StepInputs, Wanted

GATHERED = 2**15  # cached tokens that one group of several runs gathers at most


class Reach(Protocol):
    """Tokens and what they see."""

    @property
    def length(self) -> int: ...
    @property
    def context(self) -> int:
        """How many tokens the last one sees, itself included."""
        ...

    @property
    def blocks(self) -> list[int]:
        """What holds them, and perhaps more."""
        ...


@dataclass(frozen=True)
class Step:
    """The runs and what the model is given.

    first_rows: for each run the row of its first token, among those whose states may be read. ending: the runs that
    reach their end and whose next token is chosen; ending_rows: where their last tokens lie in what the model returns.
    read: the runs that reach the end of a prompt after which nothing is generated.
    """

    runs: list[Run]
    inputs: StepInputs
    first_rows: list[int]
    ending: list[Run]
    ending_rows: list[int]
    read: list[Run]


def build_step(runs: list[Run], block_size: int, with_spans: bool) -> Step:
    """Gather what the decoder needs for these runs. The sequences already hold blocks for them.

    with_spans: the angles of the model's rotary positions depend on the length of the sequence.
    """
    runs = sorted(runs, key=lambda run: kind(run, block_size))
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    spans: list[int] = []
    last_rows: list[int] = []
    for run in runs:
        s, start = run.sequence, run.sequence.computed
        stop = start + run.length
        ids += s.ids[start:stop]
        positions += range(start, stop)
        slots += [s.blocks[p // block_size] * block_size + p % block_size for p in range(start, stop)]
        if with_spans:
            spans += [max(s.span, p + 1) for p in range(start, stop)]
        last_rows.append(len(ids) - 1)
    read = [run for run in runs if run.reaches_end and run.sequence.request.max_new_tokens == 0]
    ends = [
        (run, row)
        for run, row in zip(runs, last_rows, strict=True)
        if run.reaches_end and run.sequence.request.max_new_tokens > 0
    ]
    ends.sort(key=lambda end: kind(end[0], block_size, length=1))
    ending, ending_rows = [run for run, _row in ends], [row for _run, row in ends]
    wanted = None
    if len(ends) < len(ids) and not any(run.sequence.reads_prompt for run in runs):
        wanted = Wanted(torch.tensor(ending_rows, dtype=torch.int64), list(cut(ending, block_size, length=1)))
        ending_rows = list(range(len(ends)))
    inputs = StepInputs(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        spans=torch.tensor(spans) if with_spans else None,
        slots=torch.tensor(slots),
        groups=list(cut(runs, block_size)),
        wanted=wanted,
    )
    first_rows = [last + 1 - run.length for run, last in zip(runs, last_rows, strict=True)]
    return Step(runs, inputs, first_rows, ending, ending_rows, read)


def _blocks(reach: Reach, block_size: int) -> int:
    """Blocks that hold what the last token sees."""
    return -(-reach.context // block_size)


def kind(reach: Reach, block_size: int, length: int | None = None) -> tuple[int, int]:
    """Runs of one kind may share a rectangle: equal length, and contexts within a factor of two, so that one long
    sequence does not make the short ones beside it pay its length. length: in place of the run's own."""
    return length or reach.length, (_blocks(reach, block_size) - 1).bit_length()


def cut(reaches: Sequence[Reach], block_size: int, length: int | None = None) -> Iterator[RunGroup]:
    """Cut runs, sorted by kind, into groups of one kind, each gathering a bounded number of tokens.

    length: of the end of each run that attends; None for the whole of it.
    """
    members: list[Reach] = []
    start = width = 0
    for i, reach in enumerate(reaches):
        members.append(reach)
        width = max(width, _blocks(reach, block_size))
        following = reaches[i + 1] if i + 1 < len(reaches) else None
        if (
            following is not None
            and kind(following, block_size, length) == kind(reach, block_size, length)
            and max(width, _blocks(following, block_size)) * block_size * (len(members) + 1) <= GATHERED
        ):
            continue
        table = [m.blocks[:width] for m in members]
        # a row is filled up with its own last block: nobody else's numbers come near it
        blocks = torch.tensor([row + row[-1:] * (width - len(row)) for row in table])
        yield RunGroup(start, length or reach.length, [m.context for m in members], blocks)
        start += (length or reach.length) * len(members)
        members, width = [], 0
