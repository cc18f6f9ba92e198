"""Prompts for a load: one text, the lines of a file, or synthetic ones of a given number of tokens."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from penstock.errors import EnvironmentFault, UsageError

# short and common: most vocabularies have a token for each
_WORDS = """
    time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work government number night point home water room mother area
    money story fact month lot right study book eye job word business issue side kind head house service friend father
    power hour game line end member law car city community name president team minute idea kid body information back
    parent face others level office door health person art war history party result change morning reason research girl
    guy moment air teacher force education
    """
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Synthetic:
    """Random words. words: of a prompt; shared: of them, those that begin every prompt of a group alike; groups: how
    many such beginnings there are."""

    words: int
    shared: int = 0
    groups: int = 1

    def texts(self, seed: int) -> Iterator[str]:
        """Prompts without end, the same for the same seed."""
        draw = random.Random(seed)  # noqa: S311 (not a secret)
        begins = [[draw.choice(WORDS) for _ in range(self.shared)] for _ in range(self.groups)]
        while True:
            begin = begins[draw.randrange(self.groups)]
            yield " ".join(begin + [draw.choice(WORDS) for _ in range(self.words - self.shared)])


async def fit(tokens: int, count: Callable[[str], Awaitable[int]]) -> int:
    """How many words make so many tokens. count: the tokens of a text, as the server counts them.

    A tokenizer adds some tokens of its own and has a rate of tokens a word, so two texts tell both; a third one checks.
    """
    small, large = max(1, tokens // 4), max(2, tokens)
    a, b = [await count(next(Synthetic(n).texts(seed=0))) for n in (small, large)]
    rate = (b - a) / (large - small) if b > a else 1.0
    words = max(1, round(large + (tokens - b) / rate))
    short = tokens - await count(next(Synthetic(words).texts(seed=1)))
    return max(1, words + round(short / rate))


def read_file(name: str) -> list[str]:
    """The prompts of a file: a line each, or for .jsonl the `prompt` (or `text`, or `inputs`) of an object a line.

    Raises EnvironmentFault, UsageError.
    """
    file = Path(name).expanduser()
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise EnvironmentFault(f"The prompts {file} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise UsageError(f"{file} is not text in UTF-8.") from None
    if file.suffix == ".jsonl":
        lines = [_prompt_of(file, number, line) for number, line in enumerate(lines, 1)]
    if not lines:
        raise UsageError(f"{file} holds no prompt.")
    return lines


def _prompt_of(file: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    found = (
        next((row[k] for k in ("prompt", "text", "inputs") if isinstance(row.get(k), str)), None)
        if isinstance(row, dict)
        else None
    )
    if found is None:
        raise UsageError(f"{file}, line {number}: there is no `prompt`.", "", 'A line is an object: {"prompt": "..."}')
    return str(found)


def cycle(texts: list[str]) -> Iterator[str]:
    """The same texts again and again."""
    return itertools.cycle(texts)
