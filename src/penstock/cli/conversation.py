"""What a chat consists of, wherever the model runs: messages, and how an answer ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

Message = dict[str, str]  # role and content, as every chat template and OpenAI's API have them


@dataclass
class Finish:
    """How an answer ended; counts are tokens. Filled while the answer is read."""

    reason: str = ""
    prompt_tokens: int = 0
    generated_tokens: int = 0


class Partner(Protocol):
    """Somebody who answers."""

    model: str
    plain: bool

    def reply(self, messages: list[Message], finish: Finish) -> Iterator[str]:
        """The answer in pieces. May drop the oldest messages where the context is full."""
        ...


def drop_oldest(messages: list[Message]) -> bool:
    """Forget the oldest turn (a question and its answer), never the system prompt or the last question."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    if len(messages) - first < 2:
        return False
    del messages[first]
    while len(messages) - first > 1 and messages[first]["role"] != "user":
        del messages[first]
    return True
