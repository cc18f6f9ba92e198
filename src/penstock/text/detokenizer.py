"""Token ids to text, a token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from penstock.text.pieces import Pieces


class Detokenizer:
    """Incremental: the pieces that `push` returns, with `flush` at the end, join to the text of the whole.

    A character cut in two comes out whole with its last token. `continues`: text precedes, so that a leading
    space stays. Work per token is bounded by the token's own bytes.
    """

    def __init__(self, pieces: Pieces, continues: bool = False) -> None:
        self._pieces = pieces
        self._first = not continues
        self._strip = 0 if continues else pieces.strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")(pieces.errors)

    def push(self, token_id: int) -> str:
        """The text that a token completes; "" while a character waits for its rest."""
        data = self._pieces.bytes_of(token_id, self._first)
        if self._first and self._pieces.known(token_id):
            self._first = False
        return self._stripped(self._utf8.decode(data))

    def push_all(self, token_ids: Iterable[int]) -> str:
        """What `push` returns for all of them together, in a fraction of the time."""
        rest = iter(token_ids)
        parts: list[str] = []
        for token_id in rest:
            parts.append(self.push(token_id))
            if not self._first:
                break
        bytes_of = self._pieces.bytes_of
        parts.append(self._stripped(self._utf8.decode(b"".join([bytes_of(i, False) for i in rest]))))
        return "".join(parts)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never got whole, else ""."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        # The strip counts characters of the whole text, so it may run over several tokens.
        while self._strip and text:
            if text[0] != self._pieces.strip_char:
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


def decode(pieces: Pieces, ids: list[int], continues: bool = False) -> str:
    """The text of all ids at once."""
    stream = Detokenizer(pieces, continues)
    return stream.push_all(ids) + stream.flush()
