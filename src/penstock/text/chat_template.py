"""A conversation to a prompt, by the model's own template, as transformers does it.

The templates come with checkpoints, so they are code from strangers: they run in a sandbox, in a process that can be
killed (text/renderer.py), with a second to finish.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.errors import InvalidRequest
from penstock.text.reasoning import ThinkTags, think_tags
from penstock.text.render_wire import RENDER_SECONDS
from penstock.text.renderer import RendererEnded, Renderers
from penstock.text.template_files import DEFAULT
from penstock.text.tools_format import ToolFormat, detect

TOOL_USE, RAG = "tool_use", "rag"  # names that models give to templates beside the default
# What `variables` cannot set: it has its own argument, or would mean something else than it says.
RESERVED = frozenset(
    [
        "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
        "tokenize", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
        "self", "additional_special_tokens", "extra_special_tokens",
    ]
)  # fmt: skip

Message = Mapping[str, Any]


class TemplateFailure(InvalidRequest):
    """The conversation does not fit the template, or the template is broken. Clients see the text."""


class ChatTemplate:
    """The compiled template of a model, or several by name. `render` is safe to call from several threads."""

    def __init__(self, source: str | Mapping[str, str], tokens: Mapping[str, str | list[str]]) -> None:
        """tokens: the special ones by name (`Tokenizer.template_tokens`); the template sees them as variables.

        Raises TemplateFailure when a source does not compile.
        """
        self._sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        self._tokens = {"bos_token": "", "eos_token": "", **tokens}
        try:
            self._renderers = Renderers(self._sources)
        except RendererEnded as error:
            raise TemplateFailure("syntax error: the template takes too long to compile") from error
        for found in self._renderers.found.values():
            if "error" in found:
                self.close()
                raise TemplateFailure(found["error"])

    @property
    def names(self) -> list[str]:
        """The names of the model's templates; one is called "default" where there is only one."""
        return list(self._sources)

    @functools.cached_property
    def tool_format(self) -> ToolFormat:
        """How the model writes tool calls."""
        name = self._choose(tools=True, documents=False)
        return detect(self._sources[name], "tools" in self._renderers.found[name]["variables"])

    @functools.cached_property
    def think_tags(self) -> ThinkTags | None:
        """The tags around the model's reasoning."""
        return think_tags("\n".join(self._sources.values()))

    @property
    def wants_parts(self) -> bool:
        """Whether the template goes through the parts of a content, and takes no plain string."""
        return bool(self._renderers.found[self._choose(tools=False, documents=False)]["parts"])

    @property
    def takes_parts(self) -> bool:
        """Whether the template goes through the parts of a content that has such."""
        return bool(self._renderers.found[self._choose(tools=False, documents=False)]["loops"])

    def mentions(self, text: str) -> bool:
        """Whether a text, such as the name of a role, occurs in the template."""
        return any(text in source for source in self._sources.values())

    def mentions_match(self, pattern: re.Pattern[str]) -> bool:
        """Whether a pattern is found in the template."""
        return any(pattern.search(source) for source in self._sources.values())

    def close(self) -> None:
        """End the processes that render."""
        self._renderers.close()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | None = None,
        variables: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> str:
        """The prompt.

        continue_final_message: True leaves the last message open, so that the model goes on with it; None does so
        when it is the assistant's and has text, and trims what follows it, as TGI does; False never does.
        variables: further ones for the template (`chat_template_kwargs`), but none of RESERVED. name: which of the
        model's templates; by default "tool_use" or "rag" where there are tools or documents and such a template.
        Raises TemplateFailure.
        """
        if name is None:
            name = self._choose(tools is not None, documents is not None)
        elif name not in self._sources:
            raise TemplateFailure(f"the model has no template {name!r}; it has {', '.join(map(repr, self._sources))}")
        _check(variables)
        unfinished = _unfinished(messages) if continue_final_message is None else None
        mark = ""
        if continue_final_message:
            if add_generation_prompt:
                raise TemplateFailure("`add_generation_prompt` and `continue_final_message` exclude each other")
            mark = f"<{secrets.token_hex(16)}> "
            messages = _marked(messages, mark)
        text = self._ask(
            name,
            {
                **(variables or {}),
                **self._tokens,
                "messages": list(messages),
                "tools": None if tools is None else list(tools),
                "documents": None if documents is None else list(documents),
                "add_generation_prompt": add_generation_prompt and unfinished is None,
            },
        )
        if mark:
            return _cut(text, mark)
        if unfinished is not None:
            end = text.rfind(unfinished)
            if end >= 0:
                text = text[: end + len(unfinished)].rstrip()
        return text

    def _ask(self, name: str, variables: Mapping[str, Any]) -> str:
        try:
            reply = self._renderers.ask(name, variables)
        except RendererEnded as error:
            raise TemplateFailure(
                f"the template ran for more than {RENDER_SECONDS:g} s, or took too much memory"
            ) from error
        if "error" in reply:
            raise TemplateFailure(reply["error"])
        return reply["text"]

    def _choose(self, tools: bool, documents: bool) -> str:
        if tools and TOOL_USE in self._sources:
            return TOOL_USE
        if documents and RAG in self._sources:
            return RAG
        return DEFAULT if DEFAULT in self._sources else next(iter(self._sources))


def _check(variables: Mapping[str, Any] | None) -> None:
    for variable in variables or {}:
        if variable in RESERVED:
            raise TemplateFailure(f"`chat_template_kwargs` cannot set {variable!r}")
        if not variable.isidentifier() or variable.startswith("_"):
            raise TemplateFailure(f"`chat_template_kwargs` has {variable[:64]!r}, which is no variable's name")


def _unfinished(messages: Sequence[Message]) -> str | None:
    """The last message's content when the assistant is to continue it."""
    if not messages or messages[-1].get("role") != "assistant" or messages[-1].get("tool_calls"):
        return None
    content = messages[-1].get("content")
    return content.strip() if isinstance(content, str) and content.strip() else None


def _marked(messages: Sequence[Message], mark: str) -> list[Message]:
    """The messages, with a mark behind the last one's text."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        return [*messages[:-1], {**messages[-1], "content": content + mark}]
    if isinstance(content, list):
        for i in range(len(content) - 1, -1, -1):
            if isinstance(content[i], Mapping) and isinstance(content[i].get("text"), str):
                part = {**content[i], "text": content[i]["text"] + mark}
                return [*messages[:-1], {**messages[-1], "content": [*content[:i], part, *content[i + 1 :]]}]
    raise TemplateFailure("`continue_final_message` needs a last message with text")


def _cut(text: str, mark: str) -> str:
    """The text before the mark; without the space that the template trimmed after it."""
    end = text.rfind(mark.strip())
    if end < 0:
        raise TemplateFailure("the template drops the last message, so it cannot be continued")
    return text[:end] if text.startswith(mark, end) else text[:end].rstrip()
