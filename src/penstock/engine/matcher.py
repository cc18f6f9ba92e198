"""llguidance, which nothing else imports: a model's vocabulary as it sees it, and matchers over it within limits.

Imported when the first grammar comes; without the package the engine runs and refuses grammars.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penstock.errors import InvalidRequest

# What one grammar may take. Fuel is llguidance's measure: some 50,000 a millisecond while a matcher is made, 14,000
# while a mask is computed. A lexer state takes 1 to 2 kB.
LIMITS = {
    "max_items_in_row": 2_000,
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}
_UNSUPPORTED = "grammar is not supported"


class Vocabulary:
    """The tokens of a model, and what ends a text. Making one takes a second for 128,000 tokens. Thread safe."""

    def __init__(self, folder: Path, width: int, eos_ids: Sequence[int], fresh: bool = False) -> None:
        """folder: of the model. width: of its output. fresh: answers follow no prompt, so that their text drops the
        space that a first word is spelt with. Raises InvalidRequest, because a request asked for it."""
        try:
            import llguidance
        except ImportError:
            raise InvalidRequest(f"{_UNSUPPORTED}: the package llguidance is not installed") from None
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InvalidRequest(f"{_UNSUPPORTED}: the model has no tokenizer.json")
        self.width, self._fresh = width, fresh
        try:
            self._tokenizer = llguidance.LLTokenizer(
                _understood(path.read_text(encoding="utf-8")), n_vocab=width, eos_token=list(eos_ids) or None
            )
            self._limits = llguidance.LLParserLimits(**LIMITS)
        except (OSError, ValueError) as error:
            raise InvalidRequest(f"{_UNSUPPORTED}: the tokenizer cannot be used ({_short(error)})") from None
        self._new = llguidance.LLMatcher
        self.ends = frozenset(self._tokenizer.eos_tokens)

    def matcher(self, source: str) -> Any:
        """A fresh LLMatcher that has been asked for its first mask. Raises InvalidRequest for a grammar at fault."""
        if self._fresh:
            source = _after_space(source)
        matcher = self._new(self._tokenizer, source, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(f"grammar is not valid: {_short(matcher.get_error())}")
        return matcher


def _after_space(source: str) -> str:
    """The same grammar behind a space that need not be there."""
    (grammar,) = json.loads(source)["grammars"]
    start = {"name": "start", "lark_grammar": 'start: " "? @answer'}
    return json.dumps({"grammars": [start, {**grammar, "name": "answer"}]})


def _understood(tokenizer: str) -> str:
    """A tokenizer.json as llguidance reads it, which must cut any text back into what it was put together from: where a
    letter stands for spaces by T5's one step (Metaspace), by the steps of Llama's that do the same and lose no space.
    Raises ValueError for what is no JSON."""
    settings = json.loads(tokenizer)
    decoder = settings.get("decoder") or {}
    if decoder.get("type") != "Metaspace":
        return tokenizer
    letter = decoder["replacement"]
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": letter}
    steps = [
        {"type": "Replace", "pattern": {"String": letter}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    decoder = {"type": "Sequence", "decoders": steps}
    return json.dumps(settings | {"normalizer": spaces, "pre_tokenizer": None, "decoder": decoder})


def _short(error: object) -> str:
    """The first line, without llguidance's remarks about itself."""
    lines = [line for line in str(error).splitlines() if line and not line.startswith("<")]
    return (lines[0] if lines else "no reason given")[:300]
