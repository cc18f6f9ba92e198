"""From scheduled runs to the tensors of one step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine.scheduler import Run
from penstock.kernels.attention import RunGroup


@dataclass
class StepInputs:
    """One flat batch. T tokens in all, the runs ordered by length so that equal ones are neighbours.

    ids, positions, slots: [T] int64. spans: [T] or None, see Rotary. last_rows: for each run the row of its last token.
    """

    runs: list[Run]
    ids: Tensor
    positions: Tensor
    spans: Tensor | None
    slots: Tensor
    groups: list[RunGroup]
    last_rows: list[int]


def build_step(runs: list[Run], block_size: int, dynamic_rope: bool) -> StepInputs:
    """Gather what the decoder needs for these runs. The sequences already hold blocks for them."""
    runs = sorted(runs, key=lambda run: run.length)
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    spans: list[int] = []
    last_rows: list[int] = []
    groups: list[RunGroup] = []
    members: list[Run] = []
    for i, run in enumerate(runs):
        s, start = run.sequence, run.sequence.computed
        stop = start + run.length
        ids += s.ids[start:stop]
        positions += range(start, stop)
        slots += [s.blocks[p // block_size] * block_size + p % block_size for p in range(start, stop)]
        if dynamic_rope:
            spans += [max(s.prompt_length, p + 1) for p in range(start, stop)]
        last_rows.append(len(ids) - 1)
        members.append(run)
        if i + 1 == len(runs) or runs[i + 1].length != run.length:
            groups.append(_group(members, len(ids), block_size))
            members = []
    return StepInputs(
        runs=runs,
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        spans=torch.tensor(spans) if dynamic_rope else None,
        slots=torch.tensor(slots),
        groups=groups,
        last_rows=last_rows,
    )


def _group(runs: list[Run], end: int, block_size: int) -> RunGroup:
    """Runs of one length whose tokens end at row `end`, with their block ids padded to a rectangle."""
    length = runs[0].length
    contexts = [run.sequence.computed + length for run in runs]
    width = -(-max(contexts) // block_size)
    table = [run.sequence.blocks[:width] for run in runs]
    blocks = torch.tensor([row + [0] * (width - len(row)) for row in table])
    return RunGroup(end - length * len(runs), length, contexts, blocks)
