"""Stop strings, found across token borders in linear time."""

from __future__ import annotations

from array import array
from collections.abc import Sequence


class _Pattern:
    """One stop string as a Knuth-Morris-Pratt automaton.

    The failure table grows only as far as text has matched, so a huge stop string costs nothing up front.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # characters of the pattern that the text read so far ends with
        self._fail = array("L", [0])  # fail[i]: the longest proper border of text[:i + 1]

    def step(self, char: str) -> bool:
        """Read one character; True when the pattern is complete."""
        while self.matched and self.text[self.matched] != char:
            self.matched = self._border(self.matched - 1)
        if self.text[self.matched] == char:
            self.matched += 1
        return self.matched == len(self.text)

    def _border(self, index: int) -> int:
        fail, text = self._fail, self.text
        while len(fail) <= index:
            length = fail[-1]
            char = text[len(fail)]
            while length and text[length] != char:
                length = fail[length - 1]
            fail.append(length + 1 if text[length] == char else 0)
        return fail[index]


class StopMatcher:
    """Finds the stop string that is complete first. The answer does not depend on how the text was cut into pieces.

    `push` takes a piece of text. Positions count characters of all text pushed so far: `start` and `end`
    bound the match, `found`, once there is one; `safe` is the position before which no stop string can begin any more.
    Empty stop strings are ignored: they would match before the first token.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._patterns = [_Pattern(stop) for stop in dict.fromkeys(stops) if stop]
        self._first = {pattern.text[0] for pattern in self._patterns}
        self.seen = 0
        self.start: int | None = None
        self.end: int | None = None
        self.found: str | None = None

    def push(self, text: str) -> bool:
        """Read a piece; True once a stop string is complete (then nothing more is read)."""
        if self.end is not None:
            return True
        if not self._patterns:
            self.seen += len(text)
            return False
        if self.safe == self.seen and self._first.isdisjoint(text):
            self.seen += len(text)
            return False
        for char in text:
            self.seen += 1
            # Every automaton must read the character: of those that end here the longest is the match.
            done = [pattern for pattern in self._patterns if pattern.step(char)]
            if done:
                self.end = self.seen
                self.found = max((pattern.text for pattern in done), key=len)
                self.start = self.seen - len(self.found)
                return True
        return False

    @property
    def safe(self) -> int:
        """Text before this position cannot belong to a stop string that is still to come."""
        return self.seen - max((pattern.matched for pattern in self._patterns), default=0)
