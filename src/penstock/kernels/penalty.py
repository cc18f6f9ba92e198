"""What scores less because it was there before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class Tally:
    """How often each token is in a text, kept up while the text grows: nothing is counted twice.

    Of the `count` different tokens: ids [count] int64; often, made [count] float32, how often each is in the whole text
    and in what was generated of it. length: of the text. addresses: where the three arrays lie.
    """

    def __init__(self) -> None:
        self.count = self.length = 0
        self._places: dict[int, int] = {}
        self.ids, self.often, self.made = np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32)
        self._reserve(64)

    def follow(self, text: Sequence[int], given: int) -> None:
        """Count what is new of a text, of which the first `given` tokens were not generated."""
        for i in range(self.length, len(text)):
            place = self._places.get(text[i])
            if place is None:
                place = self._places[text[i]] = self.count
                if place == len(self.ids):
                    self._reserve(2 * place)
                self.ids[place] = text[i]
                self.count += 1
            self.often[place] += 1
            self.made[place] += i >= given
        self.length = len(text)

    def _reserve(self, size: int) -> None:
        ids, often, made = np.zeros(size, np.int64), np.zeros(size, np.float32), np.zeros(size, np.float32)
        if n := len(self.ids):
            ids[:n], often[:n], made[:n] = self.ids[:n], self.often[:n], self.made[:n]
        self.ids, self.often, self.made = ids, often, made
        self.addresses: tuple[int, int, int] = (ids.ctypes.data, often.ctypes.data, made.ctypes.data)


@dataclass(frozen=True)
class Penalty:
    """Of one row. repetition: Keskar et al. 2019, 1 is none; frequency: TGI's, by the share of the text; each, once:
    OpenAI's frequency and presence penalties, of what was generated."""

    tally: Tally
    repetition: float = 1.0
    frequency: float = 0.0
    each: float = 0.0
    once: float = 0.0
