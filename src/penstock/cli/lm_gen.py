"""`lm_gen MODEL INPUT OUTPUT NUM_TOKENS TEMPERATURE`: the drop-in for the scripts of that name."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.main import INTERRUPTED, run_command
from penstock.cli.options import (
    COUNT,
    SEED,
    FiniteFloat,
    check_apart,
    engine_options,
    find_model,
    input_path,
    source_options,
)
from penstock.errors import EnvironmentFault, PartialResults

if TYPE_CHECKING:
    from penstock.batch.results import Result
    from penstock.batch.rows import Row


@click.command()
@click.argument("model")
@click.argument("source", metavar="INPUT")
@click.argument("output")
@click.argument("num_tokens", type=COUNT)
@click.argument("temperature", type=FiniteFloat(0, 1e6))
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random draws.")
@source_options
@engine_options
def lm_gen(
    model: str, source: str, output: str, num_tokens: int, temperature: float, seed: int, **options: Any
) -> None:
    """Continue every prompt of INPUT with MODEL.

    INPUT is a text file with one prompt a line. OUTPUT gets each prompt with its continuation, in the order of the
    input, with an empty line between two. NUM_TOKENS is the length of a continuation at most, TEMPERATURE the spread
    of the choice (0: always the likeliest token). `penstock generate` does more: parameters per row, JSON, resuming.
    """
    from penstock.batch.interrupt import Interrupt
    from penstock.batch.local import generate_rows
    from penstock.batch.parameters import Parameters
    from penstock.batch.prompts import Prompter
    from penstock.batch.rows import RowFile
    from penstock.cli.engine import start_engine
    from penstock.cli.progress import RowProgress
    from penstock.text.tokenizer import load_tokenizer

    check_apart(input_path(source), input_path(output))
    snapshot = find_model(model, options["revision"], options["offline"], options["trust_remote_code"])
    with contextlib.closing(RowFile(input_path(source), "txt")) as rows:
        total = rows.check().rows
        tokenizer = load_tokenizer(snapshot.path)
        run = Parameters(max_new_tokens=num_tokens, temperature=temperature, seed=seed)
        with _Text(output) as text:
            engine = start_engine(snapshot, options)
            with Interrupt() as interrupt, RowProgress(total) as progress:
                for step in generate_rows(engine, Prompter(tokenizer), text.noting(rows), run):
                    text.write(step.results)
                    progress.advance(len(step.results), step.tokens)
                    if interrupt.asked:
                        break
    print(f"{text.written:,} of {total:,} prompts continued in {output}", file=sys.stderr)
    if interrupt.asked:
        raise click.exceptions.Exit(INTERRUPTED)
    if text.errors:
        raise PartialResults(f"{text.errors:,} of {total:,} prompts could not be continued.", text.first_error)


class _Text:
    """The output file: results in the order of the input, each held until those before it are written."""

    def __init__(self, output: str) -> None:
        self._path = input_path(output)
        self._order: deque[Any] = deque()  # ids of the rows that are on their way
        self._held: dict[Any, Result] = {}
        self._file = _open(self._path)
        self.written = self.errors = 0
        self.first_error = ""

    def __enter__(self) -> _Text:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def noting(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The same rows, their order remembered."""
        for row in rows:
            self._order.append(row.name)
            yield row

    def write(self, results: list[Result]) -> None:
        """Take finished prompts; writes those whose turn it is."""
        self._held.update((result.id, result) for result in results)
        try:
            for result in self._due():
                between = "\n" if self.written + self.errors else ""
                self._file.write(f"{between}{result.prompt}{result.text or ''}\n")
                self.written += result.error is None
                self.errors += result.error is not None
                self.first_error = self.first_error or (f"Line {result.id}: {result.error}" if result.error else "")
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.close()
            raise PartialResults(
                f"The output {self._path} cannot be written: {error.strerror}.",
                f"{self.written:,} prompts are done and stay.",
                "Free some space and run it again, or use `penstock generate`, which resumes.",
            ) from error

    def _due(self) -> Iterator[Result]:
        while self._order and self._order[0] in self._held:
            yield self._held.pop(self._order.popleft())


def _open(path: Path | None) -> Any:
    if path is None:
        return open(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise EnvironmentFault(f"The output {path} cannot be opened: {error.strerror}.") from None
    return open(fd, "w", encoding="utf-8", newline="")


def main() -> None:
    """The console script `lm_gen`."""
    run_command(lm_gen, None, "lm_gen")


if __name__ == "__main__":
    main()
