"""From scheduled runs to the tensors of one step, where an encoder reads the prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from penstock.engine.scheduler import Run
from penstock.engine.step import Piece, Step, groups
from penstock.kernels.attention import RunGroup
from penstock.kernels.relative import TextGroup
from penstock.models.inputs import EncoderInputs, StepInputs


@dataclass(frozen=True)
class _Part:
    """The decoder's share of a run: `length` tokens of the sequence from `start` on.

    own: what they see of the decoder's tokens; text: what each of them sees of the encoder's.
    """

    run: Run
    start: int
    length: int
    own: list[Piece]
    text: Piece


def build_encoded_step(runs: list[Run], block_size: int) -> Step:
    """Gather what the model needs for these runs. The sequences already hold blocks for them.

    A sequence's blocks hold keys and values of its text, then, from a block of their own on, those of the decoder's
    tokens. A run that starts a sequence has all of its text.
    """
    runs = sorted(runs, key=lambda run: len(run.sequence.request.prompt_ids) * (run.sequence.computed == 0))
    fresh = [run for run in runs if run.sequence.computed == 0]
    # within a kind, what has one context is together: it is one call of the compiled kernel
    parts = sorted(_parts(runs, block_size), key=lambda p: (p.own[0].kind, p.text.kind, p.own[0].context))
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    ending: list[Run] = []
    ending_rows: list[int] = []
    for part in parts:
        s, stop = part.run.sequence, part.start + part.length
        ids += s.ids[part.start : stop]
        positions += range(part.start - s.encoded, stop - s.encoded)
        slots += _slots(s.blocks, part.start, stop, block_size)
        if part.run.reaches_end:
            ending.append(part.run)
            ending_rows.append(len(ids) - 1)
    own = [piece for part in parts for piece in part.own]
    crosses = [part.text for part in parts for _token in range(part.length)]
    inputs = StepInputs(
        ids=torch.tensor(ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        spans=None,
        slots=torch.tensor(slots, dtype=torch.int64),
        groups=list(groups(own, block_size)),
        encoder=_texts(fresh, list(groups(crosses, block_size)), block_size),
    )
    first_rows, row = [], 0
    for run in runs:
        first_rows.append(row)
        row += len(run.sequence.request.prompt_ids) * (run.sequence.computed == 0)
    read = [run for run in runs if run.sequence.request.max_new_tokens == 0]
    return Step(runs, inputs, first_rows, ending, ending_rows, read)


def _parts(runs: list[Run], block_size: int) -> Iterator[_Part]:
    for run in runs:
        s, start = run.sequence, max(run.sequence.computed, run.sequence.encoded)
        length = run.context - start
        if length > 0:
            own = Piece.of(s.blocks[s.encoded // block_size :], length, run.context - s.encoded, block_size)
            yield _Part(run, start, length, own, Piece.last(s.blocks, len(s.request.prompt_ids), block_size))


def _texts(fresh: list[Run], crosses: list[RunGroup], block_size: int) -> EncoderInputs:
    """The prompts of the runs that start a sequence, in the order of their lengths."""
    sequences = [run.sequence for run in fresh]
    ids = [token for s in sequences for token in s.request.prompt_ids]
    slots = None
    if any(s.request.max_new_tokens for s in sequences):
        places = [_slots(s.blocks, 0, len(s.request.prompt_ids), block_size) for s in sequences]
        slots = torch.tensor([slot for text in places for slot in text], dtype=torch.int64)
    texts: list[TextGroup] = []
    for length, same in groupby(len(s.request.prompt_ids) for s in sequences):
        texts.append(TextGroup(texts[-1].end if texts else 0, length, len(list(same))))
    return EncoderInputs(torch.tensor(ids, dtype=torch.int64), slots, texts, crosses)


def _slots(blocks: Sequence[int], start: int, stop: int, block_size: int) -> list[int]:
    """Where the tokens start..stop of a sequence go in the cache."""
    return [blocks[p // block_size] * block_size + p % block_size for p in range(start, stop)]
