"""From scheduled runs to the tensors of one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from penstock.engine.scheduler import Run
from penstock.kernels.attention import RunGroup
from penstock.models.decoder import StepInputs

GATHERED = 2**15  # cached tokens that one group of several runs gathers at most


@dataclass(frozen=True)
class Step:
    """The runs in the order of their rows, what the decoder is given, and the row of each run's last token."""

    runs: list[Run]
    inputs: StepInputs
    last_rows: list[int]


def build_step(runs: list[Run], block_size: int, dynamic_rope: bool) -> Step:
    """Gather what the decoder needs for these runs. The sequences already hold blocks for them."""
    runs = sorted(runs, key=lambda run: _kind(run, block_size))
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
        if dynamic_rope:
            spans += [max(s.prompt_length, p + 1) for p in range(start, stop)]
        last_rows.append(len(ids) - 1)
    inputs = StepInputs(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        spans=torch.tensor(spans) if dynamic_rope else None,
        slots=torch.tensor(slots),
        groups=list(_groups(runs, block_size)),
    )
    return Step(runs, inputs, last_rows)


def _blocks(run: Run, block_size: int) -> int:
    """Blocks that hold what the run's last token sees."""
    return -(-(run.sequence.computed + run.length) // block_size)


def _kind(run: Run, block_size: int) -> tuple[int, int]:
    """Runs of one kind may share a rectangle: equal length, and contexts within a factor of two, so that one long
    sequence does not make the short ones beside it pay its length."""
    return run.length, (_blocks(run, block_size) - 1).bit_length()


def _groups(runs: list[Run], block_size: int) -> Iterator[RunGroup]:
    """Cut the sorted runs into groups of one kind, each gathering a bounded number of tokens."""
    members: list[Run] = []
    start = width = 0
    for i, run in enumerate(runs):
        members.append(run)
        width = max(width, _blocks(run, block_size))
        following = runs[i + 1] if i + 1 < len(runs) else None
        if (
            following is not None
            and _kind(following, block_size) == _kind(run, block_size)
            and max(width, _blocks(following, block_size)) * block_size * (len(members) + 1) <= GATHERED
        ):
            continue
        contexts = [m.sequence.computed + m.length for m in members]
        table = [m.sequence.blocks[:width] for m in members]
        # a row is filled up with its own last block: nobody else's numbers come near it
        blocks = torch.tensor([row + row[-1:] * (width - len(row)) for row in table])
        yield RunGroup(start, run.length, contexts, blocks)
        start += run.length * len(members)
        members, width = [], 0
