"""What a run of `penstock generate` did, for people and for its exit code."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from penstock.cli.main import INTERRUPTED
from penstock.cli.progress import duration
from penstock.errors import PartialResults

if TYPE_CHECKING:
    from penstock.engine.report import RunReport


@dataclass
class Summary:
    """What a run did. Seconds are wall-clock; tokens are generated ones, rows of this run only."""

    model: str
    output: str
    rows: int
    done_before: int
    done: int = 0
    errors: int = 0
    tokens: int = 0
    load_seconds: float = 0.0
    generate_seconds: float = 0.0
    interrupted: bool = False
    report: RunReport | None = None

    def line(self) -> str:
        """The summary for people."""
        earlier = f" ({self.done_before:,} of them by earlier runs)" if self.done_before else ""
        rate = self.tokens / self.generate_seconds if self.generate_seconds else 0.0
        return (
            f"{self.done_before + self.done:,} of {self.rows:,} rows done{earlier}, {self.errors:,} with errors; "
            f"{self.tokens:,} tokens, {rate:,.0f} tokens/s; "
            f"load {duration(self.load_seconds)}, generation {duration(self.generate_seconds)}"
        )

    def end(self) -> None:
        """Leave with the exit code of an incomplete run, if it is one."""
        if self.interrupted:
            print(f"interrupted; the same command continues {self.output}", file=sys.stderr)
            raise click.exceptions.Exit(INTERRUPTED)
        if self.errors:
            raise PartialResults(
                f"{self.errors:,} of {self.rows:,} rows ended in an error.",
                f"Their `error` field in {self.output} says why.",
                "--retry-errors runs them again.",
            )
