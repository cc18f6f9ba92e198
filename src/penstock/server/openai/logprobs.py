"""Log-probabilities in OpenAI's two shapes: a list of objects for chats, parallel lists for text completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from penstock.server.f32 import shortest
from penstock.server.generation import Generation, TokenEvent
from penstock.server.openai import answers as wire
from penstock.text.detokenizer import Detokenizer
from penstock.text.tokenizer import Tokenizer

LOWEST = -9999.0  # stands for minus infinity, which JSON has not


def of_chat(tokenizer: Tokenizer, events: Iterable[TokenEvent], alternatives: int) -> wire.ChatLogprobs:
    """A chat choice's `logprobs`, with so many of the likeliest (the engine gives more where several are equal)."""

    def one(token_id: int, logprob: float | None) -> tuple[str, float, list[int]]:
        raw = list(tokenizer.pieces.bytes_of(token_id, first=False))
        return tokenizer.token_text(token_id), _floored(logprob), raw

    return wire.ChatLogprobs(
        [
            wire.ChosenLogprob(
                *one(event.id, event.logprob),
                top_logprobs=[wire.TokenLogprob(*one(i, logprob)) for i, logprob in event.top[:alternatives]],
            )
            for event in events
        ]
    )


class TextScores:
    """A text completion's `logprobs`, as they come: first the prompt's, if it is echoed, then tokens.

    A token that is among its own alternatives has the very same number in both places.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, alternatives: int) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._alternatives = alternatives
        self._offset = 0

    def prompt(self, generation: Generation, text: str) -> wire.TextLogprobs:
        """Of the prompt, whose echo is `text`."""
        ids = generation.request.prompt_ids
        logprobs = generation.prompt_logprobs or [None] * len(ids)
        tops: Sequence[Sequence[tuple[int, float]]] = generation.prompt_top or [()] * len(ids)
        found = wire.TextLogprobs([], [], [], [])
        detokenizer = Detokenizer(self._tokenizer.pieces)
        for token_id, logprob, top in zip(ids, logprobs, tops, strict=True):
            self._add(found, token_id, shortest(logprob), [(i, shortest(p)) for i, p in top], first=logprob is None)
            if token_id not in self._hidden:
                self._offset += len(detokenizer.push(token_id))
        self._offset = len(text)
        return found

    def push(self, events: Iterable[TokenEvent]) -> wire.TextLogprobs:
        """Of generated tokens."""
        found = wire.TextLogprobs([], [], [], [])
        for event in events:
            self._add(found, event.id, event.logprob, event.top)
            if event.id not in self._hidden:
                self._offset += len(event.text)
        return found

    def _add(
        self,
        found: wire.TextLogprobs,
        token_id: int,
        logprob: float | None,
        top: Sequence[tuple[int, float | None]],
        first: bool = False,
    ) -> None:
        text = self._tokenizer.token_text
        found.tokens.append(text(token_id))
        found.text_offset.append(self._offset)
        if first:
            found.token_logprobs.append(None)
            found.top_logprobs.append(None)
            return
        found.token_logprobs.append(_floored(logprob))
        best: dict[str, float] = {}
        for i, p in [*top[: self._alternatives], (token_id, logprob)]:
            best.setdefault(text(i), _floored(p))  # two ids may be spelt alike: the likelier stays
        found.top_logprobs.append(best)


def _floored(logprob: float | None) -> float:
    return LOWEST if logprob is None else max(logprob, LOWEST)
