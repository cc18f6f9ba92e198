"""From scheduled runs to the tensors of one step, where an encoder reads the prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from penstock.engine.scheduler import Run
from penstock.engine.step import Step, cut, kind
from penstock.kernels.attention import RunGroup
from penstock.kernels.relative import TextGroup
from penstock.models.inputs import EncoderInputs, StepInputs


@dataclass(frozen=True)
class _Reach:
    """Tokens of the decoder and what one of the attentions lets them see: `context` tokens that lie in `blocks`."""

    length: int
    context: int
    blocks: list[int]


@dataclass(frozen=True)
class _Part:
    """The decoder's share of a run. own: its own tokens; text: what the encoder made, for each token alone."""

    run: Run
    start: int  # in the sequence
    own: _Reach
    text: _Reach


def build_encoded_step(runs: list[Run], block_size: int) -> Step:
    """Gather what the model needs for these runs. The sequences already hold blocks for them.

    A sequence's blocks hold keys and values of its text, then, from a block of their own on, those of the decoder's
    tokens. A run that starts a sequence has all of its text.
    """
    runs = sorted(runs, key=lambda run: len(run.sequence.request.prompt_ids) * (run.sequence.computed == 0))
    fresh = [run for run in runs if run.sequence.computed == 0]
    # among runs of one kind, those of one context are together: they are one call of the compiled kernel
    parts = sorted(
        _parts(runs, block_size),
        key=lambda part: (kind(part.own, block_size), kind(part.text, block_size), part.own.context),
    )
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    ending: list[Run] = []
    ending_rows: list[int] = []
    for part in parts:
        s, stop = part.run.sequence, part.start + part.own.length
        ids += s.ids[part.start : stop]
        positions += range(part.start - s.encoded, stop - s.encoded)
        slots += _slots(s.blocks, part.start, stop, block_size)
        if part.run.reaches_end:
            ending.append(part.run)
            ending_rows.append(len(ids) - 1)
    each = [part.text for part in parts for _token in range(part.own.length)]
    inputs = StepInputs(
        ids=torch.tensor(ids, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int64),
        spans=None,
        slots=torch.tensor(slots, dtype=torch.int64),
        groups=list(cut([part.own for part in parts], block_size)),
        encoder=_texts(fresh, list(cut(each, block_size)), block_size),
    )
    first_rows, row = [], 0
    for run in runs:
        first_rows.append(row)
        row += len(run.sequence.request.prompt_ids) * (run.sequence.computed == 0)
    read = [run for run in runs if run.sequence.request.max_new_tokens == 0]
    return Step(runs, inputs, first_rows, ending, ending_rows, read)


def _parts(runs: list[Run], block_size: int) -> Iterator[_Part]:
    for run in runs:
        s, stop = run.sequence, run.sequence.computed + run.length
        start = max(s.computed, s.encoded)
        if stop > start:
            own = _Reach(stop - start, stop - s.encoded, s.blocks[s.encoded // block_size :])
            yield _Part(run, start, own, _Reach(1, len(s.request.prompt_ids), s.blocks))


def _texts(fresh: list[Run], crosses: list[RunGroup], block_size: int) -> EncoderInputs:
    """The prompts of the runs that start a sequence, in the order of their lengths."""
    sequences = [run.sequence for run in fresh]
    ids = [token for s in sequences for token in s.request.prompt_ids]
    slots = None
    if any(s.request.max_new_tokens for s in sequences):
        places = [_slots(s.blocks, 0, len(s.request.prompt_ids), block_size) for s in sequences]
        slots = torch.tensor([slot for text in places for slot in text], dtype=torch.int64)
    groups, row = [], 0
    for length, same in groupby(len(s.request.prompt_ids) for s in sequences):
        groups.append(TextGroup(row, length, len(list(same))))
        row = groups[-1].end
    return EncoderInputs(torch.tensor(ids, dtype=torch.int64), slots, groups, crosses)


def _slots(blocks: list[int], start: int, stop: int, block_size: int) -> list[int]:
    """Where the tokens start..stop of a sequence go in the cache."""
    return [blocks[p // block_size] * block_size + p % block_size for p in range(start, stop)]
