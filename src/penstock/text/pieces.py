"""What each token id contributes to the text, read from a tokenizer's decoder.

Every decoder that language models use turns one token into bytes without looking at its neighbours, save for
the first token of a text (a leading space may go). Knowing these bytes makes incremental decoding exact and
its work bounded: no window of tokens is ever decoded again.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import tokenizers

WHOLE = "replace"  # one U+FFFD for each broken character, as byte-level tokenizers decode
EACH_BYTE = "penstock-each-byte"  # one U+FFFD for each byte of a broken character, as byte-fallback tokenizers do

BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """Error handler of the UTF-8 decoder: every undecodable byte becomes its own U+FFFD."""
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(EACH_BYTE, _each_byte)


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level vocabularies (GPT-2's table), inverted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    for n, byte in enumerate(b for b in range(256) if b not in set(printable)):
        table[chr(256 + n)] = byte
    return table


_ALPHABET = _byte_level_alphabet()


class Pieces:
    """The bytes of each token id. `errors` names how broken UTF-8 is shown.

    strip: so many leading `strip_char` characters of a whole text are dropped.
    """

    errors = WHOLE

    def __init__(self, piece: Callable[[int], str | None], strip: int = 0, strip_char: str = " ") -> None:
        self.strip, self.strip_char = strip, strip_char
        self._piece = piece
        self._cache: dict[int, bytes] = {}

    def known(self, token_id: int) -> bool:
        """Whether the vocabulary has this id."""
        return self._piece(token_id) is not None

    def bytes_of(self, token_id: int, first: bool) -> bytes:
        """The bytes that a token adds; `first` when no text precedes it. Unknown ids add nothing."""
        if first:
            return self._make(token_id, True)
        found = self._cache.get(token_id)
        if found is None:
            found = self._cache[token_id] = self._make(token_id, False)
        return found

    def _make(self, token_id: int, first: bool) -> bytes:
        raise NotImplementedError


class ByteLevelPieces(Pieces):
    """GPT-2's scheme: every character of a piece stands for one byte."""

    def _make(self, token_id: int, first: bool) -> bytes:
        text = self._piece(token_id)
        if not text:
            return b""
        try:
            return bytes(_ALPHABET[c] for c in text)
        except KeyError:  # an added token outside the alphabet stands for itself
            return text.encode()


class Steps(NamedTuple):
    """What a SentencePiece-like decoder does, in order.

    drop_first: the first token loses all these markers.
    """

    replace: list[tuple[str, str]]
    byte_fallback: bool = False
    strip: int = 0
    strip_char: str = " "
    drop_first: str = ""


class SentencePieces(Pieces):
    """SentencePiece's scheme: a marker for spaces, `<0xXX>` for single bytes, perhaps no leading space."""

    errors = EACH_BYTE

    def __init__(self, piece: Callable[[int], str | None], steps: Steps) -> None:
        super().__init__(piece, steps.strip, steps.strip_char)
        self._steps = steps

    def _make(self, token_id: int, first: bool) -> bytes:
        text = self._piece(token_id)
        if not text:
            return b""
        if first and self._steps.drop_first:
            text = text.replace(self._steps.drop_first, "")
        for old, new in self._steps.replace:
            text = text.replace(old, new)
        byte = BYTE_PIECE.fullmatch(text) if self._steps.byte_fallback else None
        return bytes((int(byte[1], 16),)) if byte else text.encode()


class ProbedPieces(Pieces):
    """Any other decoder: the contribution is what the library prints for the token after an ordinary one."""

    def __init__(self, piece: Callable[[int], str | None], decode: Callable[[list[int]], str], anchor: int) -> None:
        super().__init__(piece)
        self._decode, self._anchor = decode, anchor
        self._anchor_text = decode([anchor])

    def _make(self, token_id: int, first: bool) -> bytes:
        if first:
            return self._decode([token_id]).encode()
        both = self._decode([self._anchor, token_id])
        return both[len(self._anchor_text) :].encode()


def pieces_of(backend: tokenizers.Tokenizer) -> Pieces:
    """Choose the scheme from the tokenizer's decoder."""
    decoder: dict[str, Any] | None = json.loads(backend.to_str())["decoder"]
    steps = _flatten(decoder)
    kinds = {step["type"] for step in steps}
    piece = backend.id_to_token
    if kinds == {"ByteLevel"}:
        return ByteLevelPieces(piece)
    sentence = _sentence_steps(steps)
    if sentence is not None:
        return SentencePieces(piece, sentence)
    anchor = next((i for i in range(backend.get_vocab_size()) if backend.decode([i]).strip().isalnum()), 0)
    return ProbedPieces(piece, lambda ids: backend.decode(ids, skip_special_tokens=False), anchor)


def _flatten(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return [{"type": "None"}]
    if decoder["type"] == "Sequence":
        return [inner for step in decoder["decoders"] for inner in _flatten(step)]
    return [decoder]


def _sentence_steps(steps: list[dict[str, Any]]) -> Steps | None:
    """The decoder as the steps of SentencePieces, or None where it does something else."""
    found = Steps([])
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"]:
            found.replace.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            found.replace.append((step["replacement"], " "))
            if step.get("prepend_scheme", "always") != "never":
                found = found._replace(drop_first=step["replacement"])
        elif kind == "ByteFallback":
            found = found._replace(byte_fallback=True)
        elif kind == "Strip" and step.get("stop", 0) == 0:
            found = found._replace(strip=step["start"], strip_char=step["content"])
        elif kind != "Fuse":
            return None
    return found
