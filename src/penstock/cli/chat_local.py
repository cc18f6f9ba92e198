"""A conversation with a model in this process."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from penstock.batch.interrupt import Interrupt
from penstock.batch.parameters import Parameters
from penstock.cli.conversation import Finish, Message, drop_oldest
from penstock.errors import InvalidRequest, ModelError
from penstock.text.chat_template import ChatTemplate, TemplateFailure
from penstock.text.stream import TextStream
from penstock.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from penstock.engine.loop import EngineLoop

DEFAULT_ANSWER = 1024  # tokens of an answer when nobody says, or half the context where that is less


class LocalChat:
    """Answers from an engine. `plain` says that the model has no chat template, so it only continues text."""

    def __init__(
        self,
        engine: EngineLoop,
        tokenizer: Tokenizer | None,
        name: str,
        asked: dict[str, Any],
        templates: dict[str, str] | None = None,
    ) -> None:
        """asked: temperature, top_p, seed, max_new_tokens, adapter, None where unset. templates: over the model's."""
        if tokenizer is None:
            raise ModelError(
                f"The model {name} has no tokenizer, so it cannot chat.",
                "Its folder holds no tokenizer.json.",
                "Copy the tokenizer's files into it, or use `penstock generate` with prompt_token_ids.",
            )
        self.model = name
        self._engine, self._tokenizer, self._asked = engine, tokenizer, asked
        self._numbers = itertools.count()
        sources = templates or tokenizer.chat_templates
        self.plain = not sources
        try:
            self._template = ChatTemplate(sources, tokenizer.template_tokens) if sources else None
        except TemplateFailure as error:
            whose = f"The chat template of {name}" if templates is None else "The chat template of --chat-template"
            raise ModelError(f"{whose} is broken.", str(error)) from error

    def reply(self, messages: list[Message], finish: Finish) -> Iterator[str]:
        """The pieces of the answer; drops the oldest turns of `messages` that the context has no room for.

        Ctrl-C ends the answer between two tokens. Raises InvalidRequest when the last message alone is too long.
        """
        limits = self._engine.limits
        wanted = self._asked["max_new_tokens"] or min(DEFAULT_ANSWER, limits.max_total_tokens // 2)
        ids = self._encode(messages)
        while len(ids) + wanted > limits.max_total_tokens and drop_oldest(messages):
            ids = self._encode(messages)
        room = limits.max_total_tokens - len(ids)
        if room < 1:
            raise InvalidRequest(
                f"The message has {len(ids):,} tokens; {limits.max_total_tokens - 1:,} fit into the model's context."
            )
        seed = secrets.randbits(63) if self._asked["seed"] is None else self._asked["seed"]
        parameters = Parameters(
            max_new_tokens=min(wanted, room),
            temperature=self._asked["temperature"],
            top_p=self._asked["top_p"],
            adapter=self._asked["adapter"],
        )
        request = parameters.request(next(self._numbers), ids, seed)
        text = TextStream(self._tokenizer, limits.continued(ids))
        self._engine.add(request)
        finish.prompt_tokens = len(ids)
        try:
            with Interrupt() as interrupt:
                while self._engine.has_work and not interrupt.asked:
                    for output in self._engine.step().outputs:
                        finish.generated_tokens += len(output.tokens)
                        yield "".join(text.push(token.id) for token in output.tokens)
                        if output.error:
                            raise InvalidRequest(output.error)
                        finish.reason = output.finish or finish.reason
            yield text.finish()
        finally:
            self._engine.abort(request.id)  # an answer that nobody reads to its end must not stay in the batch
        if not finish.reason:
            finish.reason = "interrupted"

    def _encode(self, messages: list[Message]) -> list[int]:
        if self._template is None:
            return self._tokenizer.encode(messages[-1]["content"], add_special_tokens=True)
        try:
            return self._tokenizer.encode(self._template.render(messages), add_special_tokens=False)
        except TemplateFailure as error:
            raise InvalidRequest(f"The model's chat template refuses this conversation: {error}") from error
