"""Rows through the engine of this process: it is kept full, and only a bounded number of rows is in memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock.batch.parameters import Parameters, seed_of
from penstock.batch.results import Result
from penstock.batch.rows import Row
from penstock.engine.request import EngineRequest, SequenceOutput
from penstock.errors import InvalidRequest, PartialResults
from penstock.text.stream import TextStream
from penstock.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # torch: loaded by whoever made the engine
    from penstock.engine.loop import EngineLoop

AHEAD = 2  # rows in the engine for each place in its batch: the next ones are ready when a place gets free


@dataclass(frozen=True)
class Progress:
    """What one step brought: rows that are finished, and how many tokens were generated."""

    results: list[Result]
    tokens: int


@dataclass
class _Live:
    """A row that is in the engine."""

    row: Row
    prompt_tokens: int
    text: TextStream | None
    token_ids: list[int] = field(default_factory=list)

    def result(self, finish: str, error: str | None = None) -> Result:
        if self.text is not None:
            self.text.finish()
        return Result(
            id=_id(self.row),
            prompt=self.row.prompt,
            text=None if self.text is None else self.text.text,
            token_ids=self.token_ids,
            finish_reason=finish,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=len(self.token_ids),
            error=error,
        )


def generate_rows(
    engine: EngineLoop, tokenizer: Tokenizer | None, rows: Iterable[Row], run: Parameters
) -> Iterator[Progress]:
    """Generate for all rows; yields after every step, results in the order of completion.

    A row that the engine refuses, or that fails in it, comes back as a result with `error`; the others go on. Stop
    strings stay in the text, as TGI keeps them. `run` holds the parameters for rows that have none of their own.
    """
    waiting = iter(rows)
    numbers = itertools.count()
    live: dict[int, _Live] = {}
    room = AHEAD * engine.limits.max_batch_size
    while True:
        finished: list[Result] = []
        for row in itertools.islice(waiting, room - len(live)):
            number = next(numbers)
            try:
                request, live_row = _prepare(number, row, run, tokenizer)
                engine.add(request)
                live[number] = live_row
            except InvalidRequest as error:
                finished.append(_refused(row, str(error)))
        if not engine.has_work:
            if finished:
                yield Progress(finished, 0)
                continue
            return
        tokens = 0
        for output in step_outputs(engine):
            tokens += len(output.tokens)
            result = _take(engine, live, output)
            if result is not None:
                finished.append(result)
        yield Progress(finished, tokens)


def step_outputs(engine: EngineLoop) -> list[SequenceOutput]:
    """One step of the engine. Raises PartialResults when it gives up."""
    try:
        return engine.step().outputs
    except RuntimeError as error:  # the engine's own verdict, after it has failed the rows of each step
        raise PartialResults(
            f"The engine gave up: {error}.",
            "The rows that are written stay; those in the failed steps did not finish.",
            "Run it again with --debug to see why, or with a smaller --max-batch-size.",
        ) from error


def _prepare(number: int, row: Row, run: Parameters, tokenizer: Tokenizer | None) -> tuple[EngineRequest, _Live]:
    """The engine's request for a row. Raises InvalidRequest."""
    parameters = row.over(run)
    stops = parameters.stops()
    if row.prompt_token_ids is not None:
        ids = row.prompt_token_ids
    elif not row.prompt:
        raise InvalidRequest("`prompt` cannot be empty")
    elif tokenizer is None:
        raise InvalidRequest("the model has no tokenizer: give `prompt_token_ids`")
    else:
        ids = tokenizer.encode(row.prompt, add_special_tokens=True)
    if tokenizer is None and stops:
        raise InvalidRequest("the model has no tokenizer, so `stop` strings cannot be found")
    request = parameters.request(number, ids, seed_of(row, run, _id(row)))
    text = None if tokenizer is None else TextStream(tokenizer, ids, stops)
    return request, _Live(row, len(ids), text)


def _take(engine: EngineLoop, live: dict[int, _Live], output: SequenceOutput) -> Result | None:
    """Add one step's tokens to their row; the row's result when that ends it."""
    row = live.get(output.id)
    if row is None:  # ended by a stop string in an earlier step
        return None
    finish = output.finish
    for token in output.tokens:
        row.token_ids.append(token.id)
        if row.text is None:
            continue
        row.text.push(token.id)
        if row.text.stopped:
            if finish is None:
                engine.abort(output.id)
            finish = "stop_sequence"
            break
    if finish is None:
        return None
    del live[output.id]
    return row.result(finish, output.error)


def _refused(row: Row, error: str) -> Result:
    ids = row.prompt_token_ids
    return Result(_id(row), row.prompt, None, [], "error", len(ids) if ids else 0, 0, error)


def _id(row: Row) -> int | str:
    if row.id is None:
        raise ValueError("a row from a RowFile has an id")
    return row.id
