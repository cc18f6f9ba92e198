"""Rows into token ids: the tokenizer and, for conversations, the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from penstock.batch.rows import Row
from penstock.errors import InvalidRequest
from penstock.text.chat_template import ChatTemplate, TemplateFailure
from penstock.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """What the model continues. text: None where there are only token ids."""

    text: str | None
    ids: list[int]


class Prompter:
    """Makes prompts. tokenizer: None for a model that has none, which takes token ids only."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._template: ChatTemplate | None = None

    def __enter__(self) -> Prompter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that render chat templates."""
        if self._template is not None:
            self._template.close()
            self._template = None

    def prompt(self, row: Row, chat: bool = False, system: str | None = None) -> Prompt:
        """The prompt of a row. chat: a text is a user's message; system: of a conversation that has none of its own.

        Raises InvalidRequest.
        """
        if row.prompt_token_ids is not None:
            return Prompt(None, row.prompt_token_ids)
        if self.tokenizer is None:
            raise InvalidRequest("the model has no tokenizer: give `prompt_token_ids`")
        if row.messages is None and not row.prompt:
            raise InvalidRequest("`prompt` cannot be empty")
        if row.messages is None and not chat:
            text = row.prompt or ""
            return Prompt(text, self.tokenizer.encode(text, add_special_tokens=True))
        text = self._rendered(row.messages or [{"role": "user", "content": row.prompt}], system)
        return Prompt(text, self.tokenizer.encode(text, add_special_tokens=False))

    def _rendered(self, messages: Sequence[dict[str, Any]], system: str | None) -> str:
        if not messages:
            raise InvalidRequest("`messages` cannot be empty")
        for message in messages:
            if not isinstance(message.get("role"), str) or "content" not in message:
                raise InvalidRequest("each of `messages` needs a `role` and a `content`")
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        try:
            return self._chat_template().render(messages)
        except TemplateFailure as failure:
            raise InvalidRequest(f"the model's chat template refuses it: {failure}") from failure

    def _chat_template(self) -> ChatTemplate:
        """The model's, started when the first conversation comes. Raises InvalidRequest."""
        if self._template is None:
            tokenizer = self.tokenizer
            if tokenizer is None or not tokenizer.chat_templates:
                raise InvalidRequest("the model has no chat template, so it takes no `messages`; give a `prompt`")
            self._template = ChatTemplate(tokenizer.chat_templates, tokenizer.bos_token, tokenizer.eos_token)
        return self._template
