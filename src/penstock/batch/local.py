"""Rows through an engine: it is kept full, what prompts share is computed once, memory holds a bounded number of rows.

The engine is one in this process (`EngineLoop`) or in a child (`EngineChild`).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from penstock.batch.order import WORTH, share_order
from penstock.batch.parameters import Parameters, seed_of
from penstock.batch.prompts import Prompt, Prompter
from penstock.batch.results import Result, Sample
from penstock.batch.rows import Row
from penstock.engine.limits import Limits
from penstock.engine.output import SequenceOutput, StepOutput
from penstock.engine.request import EngineRequest
from penstock.errors import InvalidRequest, PartialResults
from penstock.text.stream import TextStream
from penstock.text.tokenizer import Tokenizer

AHEAD = 2  # requests in the engine for each place in its batch: the next ones are ready when a place gets free
WINDOW = 2048  # rows that are put in order together
WINDOW_CHARACTERS = 2**24  # of their prompts, about


class Engine(Protocol):
    """What an engine is to a batch; see EngineLoop."""

    limits: Limits

    @property
    def has_work(self) -> bool: ...

    def add(self, request: EngineRequest) -> None: ...

    def abort(self, request_id: int) -> None: ...

    def step(self) -> StepOutput: ...


@dataclass(frozen=True)
class Progress:
    """What one step brought: rows that are finished, and how many tokens were generated."""

    results: list[Result]
    tokens: int


@dataclass(eq=False)
class _Answer:
    """One sample of a row, waiting or in the engine."""

    task: _Task
    sample: int
    request: EngineRequest
    continued: list[int]  # the tokens that its text follows
    stops: TextStream | None  # looks for stop strings; without them, the text is made at the end, at once
    followers: list[_Answer] = field(default_factory=list)  # may start when this one's prompt is computed
    token_ids: list[int] = field(default_factory=list)

    def end(self, finish: str) -> Sample:
        return Sample(self._text(), self.token_ids, finish)

    def _text(self) -> str | None:
        tokenizer = self.task.tokenizer
        if self.stops is not None:
            self.stops.finish()
            return self.stops.text
        if tokenizer is None:
            return None
        continues = any(i not in tokenizer.special_ids for i in reversed(self.continued))
        return tokenizer.decode(self.token_ids, continues=continues)


@dataclass(eq=False)
class _Task:
    """A row on its way, with its samples by number."""

    row: Row
    prompt: Prompt
    tokenizer: Tokenizer | None
    samples: list[Sample | None]
    answers: list[_Answer] = field(default_factory=list)
    failed: bool = False

    def result(self) -> Result | None:
        """The row's result, once all samples have ended."""
        samples = [sample for sample in self.samples if sample is not None]
        return None if len(samples) < len(self.samples) else self._result(samples, None)

    def failure(self, error: str) -> Result:
        """The result of a row that could not be finished; the text that there is stays where it was to be the only."""
        self.failed = True
        sample = self.answers[0].end("error") if len(self.answers) == 1 else Sample(None, [], "error")
        return self._result([sample], error)

    def _result(self, samples: list[Sample], error: str | None) -> Result:
        first = samples[0]
        return Result(
            id=self.row.name,
            prompt=self.prompt.text,
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            prompt_tokens=len(self.prompt.ids),
            generated_tokens=sum(len(sample.token_ids) for sample in samples),
            error=error,
            samples=samples if len(samples) > 1 else None,
            hash=self.row.identity(),
        )


def generate_rows(
    engine: Engine, prompter: Prompter, rows: Iterable[Row], run: Parameters, window: int = WINDOW
) -> Generator[Progress, None, None]:
    """Generate for all rows; yields after every step, results in the order of completion.

    window: texts that are read ahead and put in order together.

    A row that the engine refuses, or that fails in it, comes back as a result with `error`; the others go on. Stop
    strings stay in the text, as TGI keeps them. `run` holds the parameters for rows that have none of their own.
    When the iterator is closed early, what still runs is aborted, and the engine can be used again.
    """
    batch = _Batch(engine, prompter, run, iter(rows), window)
    try:
        yield from batch.steps()
    finally:
        batch.abort()


def step_outputs(engine: Engine) -> list[SequenceOutput]:
    """One step of the engine. Raises PartialResults when it gives up."""
    try:
        return engine.step().outputs
    except RuntimeError as error:  # the engine's own verdict, after it has failed the rows of each step
        raise PartialResults(
            f"The engine gave up: {error}.",
            "The rows that are written stay; those in the failed steps did not finish.",
            "Run it again with --debug to see why, or with a smaller --max-batch-size.",
        ) from error


class _Batch:
    """One call of `generate_rows`."""

    def __init__(self, engine: Engine, prompter: Prompter, run: Parameters, rows: Iterator[Row], window: int) -> None:
        self._engine, self._prompter, self._run, self._rows = engine, prompter, run, rows
        self._window = window
        self._numbers = itertools.count()
        self._ready: deque[_Answer] = deque()  # may start
        self._live: dict[int, _Answer] = {}  # in the engine
        self._held = 0  # answers that wait for a leader
        self._refused: list[Result] = []
        self._room = AHEAD * engine.limits.max_batch_size

    def steps(self) -> Iterator[Progress]:
        while True:
            self._feed()
            finished, self._refused = self._refused, []
            if not self._live:
                if not finished:
                    return
                yield Progress(finished, 0)
                continue
            tokens = 0
            for output in step_outputs(self._engine):
                tokens += len(output.tokens)
                result = self._take(output)
                if result is not None:
                    finished.append(result)
            yield Progress(finished, tokens)

    def abort(self) -> None:
        for number in self._live:
            self._engine.abort(number)
        self._live.clear()

    def _feed(self) -> None:
        """Fill the engine, and read more rows when all that were read are in it."""
        while len(self._live) < self._room and not self._refused:
            if self._ready:
                self._start(self._ready.popleft())
            elif self._held or not self._read():
                return

    def _read(self) -> bool:
        """Read a window of rows and put it in order. False at the end of the input."""
        rows: list[tuple[Row, Parameters]] = []
        samples = characters = 0
        for row in self._rows:
            rows.append((row, row.over(self._run)))
            samples += max(1, rows[-1][1].n or 1)
            characters += len(row.prompt or row.prompt_token_ids or row.messages or "")
            if samples >= self._window or characters >= WINDOW_CHARACTERS:
                break
        prompts = self._prompter.prompts([(row, bool(asked.chat), asked.system) for row, asked in rows])
        made = [self._task(row, asked, prompt) for (row, asked), prompt in zip(rows, prompts, strict=True)]
        tasks = [task for task in made if task is not None]
        for index, leader in share_order([task.prompt.ids for task in tasks]):
            task = tasks[index]
            self._wait(task.answers[0], None if leader is None else tasks[leader].answers[0])
            same = task.answers[0] if len(task.prompt.ids) >= WORTH else None
            for answer in task.answers[1:]:
                self._wait(answer, same)
        return bool(rows)

    def _task(self, row: Row, parameters: Parameters, prompt: Prompt | InvalidRequest) -> _Task | None:
        """A row that is ready for the engine; None for one that is refused."""
        if isinstance(prompt, InvalidRequest):
            self._refuse(row, None, str(prompt))
            return None
        tokenizer = self._prompter.tokenizer
        try:
            stops = parameters.stops()
            if tokenizer is None and stops:
                raise InvalidRequest("the model has no tokenizer, so `stop` strings cannot be found")
            task = _Task(row, prompt, tokenizer, [None] * parameters.samples())
            first = parameters.request(0, prompt.ids, 0)
        except InvalidRequest as error:
            self._refuse(row, prompt, str(error))
            return None
        for sample in range(len(task.samples)):
            sampling = msgspec.structs.replace(first.sampling, seed=seed_of(row, self._run, row.name, sample))
            request = msgspec.structs.replace(first, id=next(self._numbers), sampling=sampling)
            continued = self._engine.limits.continued(prompt.ids)
            stream = TextStream(tokenizer, continued, stops) if tokenizer is not None and stops else None
            task.answers.append(_Answer(task, sample, request, continued, stream))
        return task

    def _wait(self, answer: _Answer, leader: _Answer | None) -> None:
        """Let an answer start behind its leader's prompt."""
        if leader is None:
            self._ready.append(answer)
        else:
            leader.followers.append(answer)
            self._held += 1

    def _release(self, leader: _Answer) -> None:
        """A leader's prompt is computed, or never will be."""
        if leader.followers:
            self._ready.extendleft(reversed(leader.followers))
            self._held -= len(leader.followers)
            leader.followers = []

    def _start(self, answer: _Answer) -> None:
        if answer.task.failed:  # another sample of the row was refused
            self._release(answer)
            return
        try:
            self._engine.add(answer.request)
        except InvalidRequest as error:
            self._refused.append(self._fail(answer, str(error)))
        else:
            self._live[answer.request.id] = answer

    def _take(self, output: SequenceOutput) -> Result | None:
        """Add one step's tokens to their answer; the row's result when that ends it."""
        answer = self._live.get(output.id)
        if answer is None:  # ended by a stop string in an earlier step
            return None
        self._release(answer)
        finish = self._push(answer, output)
        if finish is None:
            return None
        del self._live[output.id]
        if output.error is not None:
            return self._fail(answer, output.error)
        answer.task.samples[answer.sample] = answer.end(finish)
        return answer.task.result()

    def _push(self, answer: _Answer, output: SequenceOutput) -> str | None:
        """Why the answer ends with these tokens, or None."""
        for token in output.tokens:
            answer.token_ids.append(token.id)
            if answer.stops is None:
                continue
            answer.stops.push(token.id)
            if answer.stops.stopped:
                if output.finish is None:
                    self._engine.abort(output.id)
                return "stop_sequence"
        return output.finish

    def _fail(self, answer: _Answer, error: str) -> Result:
        """End a row with all its samples."""
        for other in answer.task.answers:
            if self._live.pop(other.request.id, None) is not None:
                self._engine.abort(other.request.id)
            self._release(other)
        return answer.task.failure(error)

    def _refuse(self, row: Row, prompt: Prompt | None, error: str) -> None:
        """Note the result of a row that does not reach the engine."""
        ids = row.prompt_token_ids if prompt is None else prompt.ids
        text = row.prompt if prompt is None else prompt.text
        found = Result(row.name, text, None, [], "error", len(ids or ()), 0, error, hash=row.identity())
        self._refused.append(found)
