"""The tools of a request, and how a model is told of them.

`plan_tools` makes of a request's fields a ToolPlan, from which follow the messages and tools to render, the grammar
that forces a call where one is demanded, and the parser of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from penstock.text.grammar import GrammarSpec
from penstock.text.reasoning import ThinkTags
from penstock.text.tools_definitions import Tool, ToolChoice, read_choice, read_tools
from penstock.text.tools_format import ToolFormat
from penstock.text.tools_grammar import tool_grammar
from penstock.text.tools_messages import (
    Messages,
    described,
    plain_messages,
    tell_tools,
    template_messages,
    with_system_tools,
)
from penstock.text.tools_parser import ToolParser

if TYPE_CHECKING:
    from penstock.text.chat_template import ChatTemplate
    from penstock.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolPlan:
    """How tools take part in one request. tools: those that may be called."""

    tools: tuple[Tool, ...]
    choice: ToolChoice
    format: ToolFormat
    parallel: bool = True
    prompt: str = ""  # the client's own words about tools (TGI's `tool_prompt`)

    @property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """What the template gets as `tools`; None where it knows nothing of them, and the messages say it."""
        return described(self.tools) if self.format.native else None

    def messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages to render, with what has to be said about the tools in them."""
        ready = tell_tools(messages, self.tools, self.format.native, self.choice.mode == "required", self.prompt)
        return with_system_tools(ready, self.tools, self.format) if self.format.in_system else ready

    def grammar(self, tokenizer: Tokenizer, tags: ThinkTags | None, opened: bool) -> GrammarSpec | None:
        """What the answer must match where a call is demanded.

        tags: the model may think before; opened: the prompt has the open tag.
        """
        if self.choice.mode != "required":
            return None
        schemas = {tool.name: tool.parameters for tool in self.tools}
        return tool_grammar(schemas, self.format, self.parallel and self.choice.name is None, tokenizer, tags, opened)

    def parser(self) -> ToolParser:
        """A parser for one answer."""
        forced = self.choice.mode == "required"
        return ToolParser(self.format, [tool.name for tool in self.tools], self.parallel, forced)


def plan_tools(
    raw_tools: object,
    raw_choice: object,
    template: ChatTemplate,
    tool_prompt: str | None = None,
    parallel: bool = True,
) -> ToolPlan | None:
    """The plan for a request's `tools`, `tool_choice`, `tool_prompt` and `parallel_tool_calls`.

    None where no tools take part: none are given, or the choice is "none". Raises InvalidTools.
    """
    tools = read_tools(raw_tools)
    choice = read_choice(raw_choice, tools)
    if not tools or choice.mode == "none":
        return None
    wanted = choice.allowed if choice.name is None else {choice.name}
    if wanted is not None:
        tools = tuple(tool for tool in tools if tool.name in wanted)
    return ToolPlan(tools, choice, template.tool_format, parallel, tool_prompt or "")


def conversation(
    messages: Sequence[Mapping[str, Any]], plan: ToolPlan | None, template: ChatTemplate, image: str = ""
) -> Messages:
    """The messages to render for a request: as the template wants them, with what has to be said about its tools.

    image: what stands for an image where the template prints nothing for it.
    """
    ready = template_messages(messages, template, image)
    if plan is not None:
        ready = plan.messages(ready)
    elif not template.tool_format.native:
        ready = plain_messages(ready)
    if template.wants_parts:
        for message in ready:
            if isinstance(message.get("content"), str):
                message["content"] = [{"type": "text", "text": message["content"]}]
    return ready
