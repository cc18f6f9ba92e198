"""Rows through the engine of this process for their hidden states."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.batch.local import AHEAD, step_outputs
from penstock.batch.rows import Row
from penstock.engine.request import Embed, EngineRequest
from penstock.errors import InvalidRequest
from penstock.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # torch: loaded by whoever made the engine
    from penstock.engine.loop import EngineLoop


@dataclass(frozen=True)
class Part:
    """What a step made for one row: states as SequenceOutput.embedding has them, and with the last part how it ended.

    number: of the row in the input, from 0. tokens: of the prompt, empty unless `last`.
    """

    number: int
    row: Row
    states: bytes | None
    last: bool
    token_ids: list[int]
    error: str | None = None


def embed_rows(
    engine: EngineLoop, tokenizer: Tokenizer | None, rows: Iterable[tuple[int, Row]], embed: Embed
) -> Iterator[list[Part]]:
    """The states of all rows, given with their numbers; yields after every step. Rows that the engine refuses, or that
    fail in it, end with `error`; the others go on."""
    waiting = iter(rows)
    live: dict[int, tuple[Row, list[int]]] = {}
    room = AHEAD * engine.limits.max_batch_size
    while True:
        parts: list[Part] = []
        for number, row in itertools.islice(waiting, room - len(live)):
            try:
                ids = _prompt(row, tokenizer)
                engine.add(EngineRequest(number, ids, 0, embed=embed))
                live[number] = row, ids
            except InvalidRequest as error:
                parts.append(Part(number, row, None, True, [], str(error)))
        if not engine.has_work:
            if parts:
                yield parts
                continue
            return
        for output in step_outputs(engine):
            row, ids = live[output.id]
            last = output.finish is not None
            if last:
                del live[output.id]
            parts.append(Part(output.id, row, output.embedding, last, ids if last else [], output.error))
        yield parts


def _prompt(row: Row, tokenizer: Tokenizer | None) -> list[int]:
    """The ids of a row's prompt. Raises InvalidRequest."""
    if row.prompt_token_ids is not None:
        return row.prompt_token_ids
    if tokenizer is None:
        raise InvalidRequest("the model has no tokenizer: give `prompt_token_ids`")
    return tokenizer.encode(row.prompt or "", add_special_tokens=True)
