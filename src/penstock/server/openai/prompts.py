"""Prompts of text completions and embeddings: a text, the token ids of one, or a list of such."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.server.house import House
from penstock.server.refusal import Refusal, invalid


@dataclass(frozen=True)
class TextPrompt:
    """A prompt with its token ids."""

    text: str
    ids: list[int]


async def read_prompts(house: House, given: str | list[Any], name: str, most: int, special: bool) -> list[TextPrompt]:
    """The prompts of a field. special: texts get the tokenizer's special tokens. Raises Refusal 422."""
    items = _items(given, name)
    if len(items) > most:
        text = f"Number of prompts exceeds the maximum allowed batch size of {most}"
        raise Refusal(422, text, "batch size exceeded", param=name)
    return [await _prompt(house, item, name, special) for item in items]


def _items(given: str | list[Any], name: str) -> list[str | list[int]]:
    """One entry a prompt."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid(f"Empty array detected. Do not use an empty array for the {name}.", name)
    if _are_ids(given):
        return [given]
    if all(isinstance(item, str) or (isinstance(item, list) and _are_ids(item)) for item in given):
        return given
    raise invalid(f"`{name}` must be a string, a list of token ids or a list of such prompts", name)


def _are_ids(given: list[Any]) -> bool:
    return bool(given) and all(type(item) is int for item in given)


async def _prompt(house: House, item: str | list[int], name: str, special: bool) -> TextPrompt:
    if isinstance(item, str):
        if not item:
            raise invalid("`inputs` cannot be empty", name)
        return TextPrompt(item, await house.encode(item, add_special_tokens=special))
    size = house.limits.vocab_size
    if not all(0 <= i < size for i in item):
        raise invalid(f"`{name}` has a token id outside the vocabulary of {size}", name)
    return TextPrompt(house.tokenizer.decode(item), item)
