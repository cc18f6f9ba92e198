"""Facts: one short answer each, with the many ways in which people name what they ask about."""

import dataclasses
import pathlib
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Fact:
    """An answer, the string that a right answer must hold, and the patterns of the questions it answers."""

    key: str
    answer: str
    domain: str
    tasks: tuple[str, ...]
    terms: tuple[str, ...]
    codes: tuple[str, ...]
    questions: tuple[str, ...]


def load_facts() -> list[Fact]:
    """All facts of the text files beside this module, in a fixed order."""
    folder = pathlib.Path(__file__).parent / "facts"
    return [fact for path in sorted(folder.glob("*.txt")) for fact in _parse(path)]


def _parse(path: pathlib.Path) -> Iterator[Fact]:
    domain = path.stem.split("_")[0]
    for block in path.read_text(encoding="utf-8").split("\n= ")[1:]:
        key, *lines = block.strip().splitlines()
        found: dict[str, list[str]] = {mark: [] for mark in "a?!$q"}
        for line in lines:
            found[line[0]].append(line[2:].strip())
        codes = [code for line in found["$"] for code in line.split(" | ")]
        answer = found["a"][0]
        if key not in answer:
            raise ValueError(f"{path.name}: the answer does not hold its key: {key}")
        yield Fact(
            key=key.strip(),
            answer=answer,
            domain=domain,
            tasks=tuple(found["?"]),
            terms=tuple(found["!"]),
            codes=tuple(codes),
            questions=tuple(found["q"]),
        )
