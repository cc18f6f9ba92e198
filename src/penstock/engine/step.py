"""From scheduled runs to the tensors of one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.engine.scheduler import Run
from penstock.kernels.attention import RunGroup
from penstock.models.inputs import ImageRows, StepInputs, Wanted

GATHERED = 2**15  # cached tokens that one group of several runs gathers at most


@dataclass(frozen=True)
class Step:
    """The runs in the order of their rows and what the decoder is given.

    last_rows: for each run the row of its last token. ending: the runs that reach their end and whose next token is
    chosen; ending_rows: where their last tokens lie in what the decoder returns. read: the runs that reach the end of a
    prompt after which nothing is generated.
    """

    runs: list[Run]
    inputs: StepInputs
    last_rows: list[int]
    ending: list[Run]
    ending_rows: list[int]
    read: list[Run]


def build_step(runs: list[Run], block_size: int, with_spans: bool) -> Step:
    """Gather what the decoder needs for these runs. The sequences already hold blocks for them.

    with_spans: the angles of the model's rotary positions depend on the length of the sequence.
    """
    runs = sorted(runs, key=lambda run: _kind(run.length, run, block_size))
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
    ends.sort(key=lambda end: _kind(1, end[0], block_size))
    ending, ending_rows = [run for run, _row in ends], [row for _run, row in ends]
    wanted = None
    if len(ends) < len(ids) and not any(run.sequence.reads_prompt for run in runs):
        wanted = Wanted(torch.tensor(ending_rows, dtype=torch.int64), list(_groups(ending, block_size, length=1)))
        ending_rows = list(range(len(ends)))
    inputs = StepInputs(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        spans=torch.tensor(spans) if with_spans else None,
        slots=torch.tensor(slots),
        groups=list(_groups(runs, block_size)),
        wanted=wanted,
        axes=_axes(runs, positions),
        images=_image_rows(runs),
    )
    return Step(runs, inputs, last_rows, ending, ending_rows, read)


def _axes(runs: list[Run], positions: list[int]) -> Tensor | None:
    """The three places of each row, where a run has an image in a model with M-RoPE. positions: of the rows."""
    turned = [run.sequence.images is not None and run.sequence.images.axes is not None for run in runs]
    if not any(turned):
        return None
    axes = torch.tensor(positions).repeat(3, 1)
    row = 0
    for run in runs:
        images, start = run.sequence.images, run.sequence.computed
        if images is not None and images.axes is not None:
            prompt = images.axes[:, start : start + run.length]
            axes[:, row : row + prompt.shape[1]] = prompt
            axes[:, row + prompt.shape[1] : row + run.length] += images.shift
        row += run.length
    return axes


def _image_rows(runs: list[Run]) -> ImageRows | None:
    """The rows that are parts of images, and their features, which the sequences have already."""
    rows: list[int] = []
    parts: list[Tensor] = []
    row = 0
    for run in runs:
        images, start = run.sequence.images, run.sequence.computed
        if images is not None:
            offsets, features = images.rows(start, start + run.length)
            rows += [row + offset for offset in offsets]
            parts += features
        row += run.length
    return ImageRows(torch.tensor(rows), torch.cat(parts)) if rows else None


def _blocks(run: Run, block_size: int) -> int:
    """Blocks that hold what the run's last token sees."""
    return -(-(run.sequence.computed + run.length) // block_size)


def _kind(length: int, run: Run, block_size: int) -> tuple[int, int]:
    """Runs of one kind may share a rectangle: equal length, and contexts within a factor of two, so that one long
    sequence does not make the short ones beside it pay its length."""
    return length, (_blocks(run, block_size) - 1).bit_length()


def _groups(runs: list[Run], block_size: int, length: int | None = None) -> Iterator[RunGroup]:
    """Cut the sorted runs into groups of one kind, each gathering a bounded number of tokens.

    length: of the end of each run that attends; None for the whole of it.
    """
    members: list[Run] = []
    start = width = 0
    for i, run in enumerate(runs):
        if length is None and run.sees_ahead:
            yield from _ahead(run, start, block_size)
            start += run.length
            continue
        members.append(run)
        width = max(width, _blocks(run, block_size))
        following = runs[i + 1] if i + 1 < len(runs) else None
        if (
            following is not None
            and not (length is None and following.sees_ahead)
            and _kind(length or following.length, following, block_size) == _kind(length or run.length, run, block_size)
            and max(width, _blocks(following, block_size)) * block_size * (len(members) + 1) <= GATHERED
        ):
            continue
        contexts = [m.sequence.computed + m.length for m in members]
        table = [m.sequence.blocks[:width] for m in members]
        # a row is filled up with its own last block: nobody else's numbers come near it
        blocks = torch.tensor([row + row[-1:] * (width - len(row)) for row in table])
        yield RunGroup(start, length or run.length, contexts, blocks)
        start += (length or run.length) * len(members)
        members, width = [], 0


def _ahead(run: Run, start: int, block_size: int) -> Iterator[RunGroup]:
    """The groups of a run whose tokens see each other in both directions, up to the sequence's `whole`.

    Each token is a run of its own whose context is all of them: their keys and values are in the cache before any
    attends. start: the run's first row.
    """
    sequence = run.sequence
    stop = sequence.computed + run.length
    blocks = torch.tensor([sequence.blocks[: _blocks(run, block_size)]])
    rows = min(stop, sequence.whole) - sequence.computed
    most = max(1, GATHERED // (blocks.shape[1] * block_size))
    for first in range(0, rows, most):
        n = min(most, rows - first)
        yield RunGroup(start + first, 1, [sequence.whole] * n, blocks.repeat(n, 1))
    if stop > sequence.whole:
        yield RunGroup(start + rows, stop - sequence.whole, [stop], blocks)
