"""From scheduled runs to the tensors of one step."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from penstock.engine.scheduler import Run
from penstock.kernels.attention import RunGroup
from penstock.models.inputs import ImageRows, StepInputs, Wanted
from penstock.models.lora import Adapter, RowAdapters

GATHERED = 2**15  # cached tokens that one group of several runs gathers at most
_WORTHWHILE = 1.5  # rows of a step to those that are wanted, from where on the last layer leaves the others out
_FEW, _SINGLY = 8, 2**11  # tokens of a run that may go one by one, and the cached ones that may be read again for it


@dataclass(frozen=True)
class Step:
    """The runs and what the model is given.

    first_rows: for each run the row of its first token, among those whose states may be read. ending: the runs that
    reach their end and whose next token is chosen, in the order of their rows; ending_rows: where their last tokens lie
    in what the model returns. read: the runs that reach the end of a prompt after which nothing is generated.
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
    whole = ((run, _pieces(run, block_size)) for run in runs)
    cut = sorted(whole, key=lambda item: item[1][0].kind)
    runs = [run for run, _pieces in cut]
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
    wanted, ending, ending_rows = None, [run for run, _row in ends], [row for _run, row in ends]
    if _WORTHWHILE * len(ends) < len(ids) and not any(run.sequence.reads_prompt for run in runs):
        lasts = [Piece.last(run.blocks, run.context, block_size) for run in ending]
        order = sorted(range(len(ends)), key=lambda i: lasts[i].kind)
        ending, rows = [ending[i] for i in order], torch.tensor([ending_rows[i] for i in order], dtype=torch.int64)
        wanted = Wanted(rows, list(groups([lasts[i] for i in order], block_size)))
        ending_rows = list(range(len(ends)))
    inputs = StepInputs(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        spans=torch.tensor(spans) if with_spans else None,
        slots=torch.tensor(slots),
        groups=list(groups([piece for _run, pieces in cut for piece in pieces], block_size)),
        wanted=wanted,
        adapters=row_adapters(runs),
        axes=_axes(runs, positions),
        images=_image_rows(runs),
    )
    first_rows = [last + 1 - run.length for run, last in zip(runs, last_rows, strict=True)]
    return Step(runs, inputs, first_rows, ending, ending_rows, read)


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


def row_adapters(runs: list[Run], device: torch.device | None = None) -> RowAdapters | None:
    """Whose rows are whose; None where no run has an adapter."""
    if all(run.sequence.adapter is None for run in runs):
        return None
    places: dict[Adapter, int] = {}
    owners: list[int] = []
    for run in runs:
        adapter = run.sequence.adapter
        owner = -1 if adapter is None else places.setdefault(adapter.weights, len(places))
        owners += [owner] * run.length
    whole = len(places) == 1 and -1 not in owners
    return RowAdapters(tuple(places), None if whole else torch.tensor(owners, device=device))


class Piece(NamedTuple):
    """Rows that attend together: `length` of them, the last of which sees `context` tokens in `blocks`.

    kind: pieces of one kind may share a rectangle: equal length, and contexts within a factor of two, so that one long
    sequence does not make the short ones beside it pay its length.
    """

    blocks: array[int]
    length: int
    context: int
    kind: tuple[int, int]

    @classmethod
    def of(cls, blocks: array[int], length: int, end: int, block_size: int) -> list[Piece]:
        """The pieces of a run of `length` tokens, the last of which sees `end`. A run of one token or of many is one.
        One of a few, as a grammar forces them, goes token by token beside those that decode: reading a short context
        again costs less than a group of its own."""
        deepest = ((end - 1) // block_size).bit_length()
        if length == 1 or length > _FEW or (length - 1) * end > _SINGLY:
            return [cls(blocks[: (end - 1) // block_size + 1], length, end, (length, deepest))]
        return [
            cls(blocks[: (context - 1) // block_size + 1], 1, context, (1, deepest))
            for context in range(end - length + 1, end + 1)
        ]

    @classmethod
    def last(cls, blocks: array[int], end: int, block_size: int) -> Piece:
        """The last token of a run alone."""
        return cls.of(blocks, 1, end, block_size)[0]


def _pieces(run: Run, block_size: int) -> list[Piece]:
    """The pieces of a run. Where its tokens see each other in both directions each is a piece of its own, whose context
    is all of them: their keys and values are in the cache before any attends."""
    first, whole = run.sequence.computed, run.sequence.whole
    if first >= whole:
        return Piece.of(run.blocks, run.length, run.context, block_size)
    contexts = [max(whole, n) for n in range(first + 1, run.context + 1)]
    return [Piece.last(run.blocks, context, block_size) for context in contexts]


def groups(pieces: list[Piece], block_size: int) -> Iterator[RunGroup]:
    """Cut the sorted pieces into groups of one kind, each gathering a bounded number of tokens."""
    members: list[Piece] = []
    start = width = 0
    for i, piece in enumerate(pieces):
        members.append(piece)
        width = max(width, len(piece.blocks))
        following = pieces[i + 1] if i + 1 < len(pieces) else None
        if (
            following is not None
            and following.kind == piece.kind
            and max(width, len(following.blocks)) * block_size * (len(members) + 1) <= GATHERED
        ):
            continue
        # a row is filled up with its own last block: nobody else's numbers come near it
        table = array("q")
        for m in members:
            table += m.blocks if len(m.blocks) == width else m.blocks + m.blocks[-1:] * (width - len(m.blocks))
        blocks = torch.frombuffer(table, dtype=torch.int64).view(len(members), width)
        yield RunGroup(start, piece.length, [m.context for m in members], blocks)
        start += piece.length * len(members)
        members, width = [], 0
