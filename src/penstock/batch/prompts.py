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
        found = self.prompts([(row, chat, system)])[0]
        if isinstance(found, InvalidRequest):
            raise found
        return found

    def prompts(self, asked: Sequence[tuple[Row, bool, str | None]]) -> list[Prompt | InvalidRequest]:
        """The prompts of many rows, each as (row, chat, system); what is wrong, in the place of one that has none."""
        found: list[Prompt | InvalidRequest | None] = [None] * len(asked)
        texts: dict[bool, list[tuple[int, str]]] = {True: [], False: []}  # with and without special tokens added
        for number, (row, chat, system) in enumerate(asked):
            try:
                if row.prompt_token_ids is not None:
                    found[number] = Prompt(None, row.prompt_token_ids)
                else:
                    text, special = self._text(row, chat, system)
                    texts[special].append((number, text))
            except InvalidRequest as error:
                found[number] = error
        for special, items in texts.items():
            for (number, text), ids in zip(items, self._encoded([text for _, text in items], special), strict=True):
                found[number] = ids if isinstance(ids, InvalidRequest) else Prompt(text, ids)
        return [each for each in found if each is not None]

    def _encoded(self, texts: list[str], special: bool) -> list[list[int] | InvalidRequest]:
        if self.tokenizer is None or not texts:
            return []
        try:
            return list(self.tokenizer.encode_all(texts, special))
        except (TypeError, ValueError):  # one of them is no Unicode: half a pair of surrogates
            if len(texts) == 1:
                return [InvalidRequest("the prompt is not valid Unicode")]
            return [ids for text in texts for ids in self._encoded([text], special)]

    def _text(self, row: Row, chat: bool, system: str | None) -> tuple[str, bool]:
        """(the text of a row's prompt, whether the tokenizer adds its special tokens). Raises InvalidRequest."""
        if self.tokenizer is None:
            raise InvalidRequest("the model has no tokenizer: give `prompt_token_ids`")
        if row.messages is None and not row.prompt:
            raise InvalidRequest("`prompt` cannot be empty")
        if row.messages is None and not chat:
            return row.prompt or "", True
        said = [{"role": "user", "content": row.prompt}] if row.messages is None else row.messages
        return self._rendered(said, system), False

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
            self._template = ChatTemplate(tokenizer.chat_templates, tokenizer.template_tokens)
        return self._template
