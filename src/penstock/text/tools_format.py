"""How a model writes tool calls, told from its chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from penstock.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolFormat:
    """One way of writing calls, as the parser and the grammar use it.

    trigger: begins calls, anywhere in the answer; what follows must be one. "": there is none.
    bare: an answer that begins as JSON is a call too, if it has the name of a tool.
    separators: may stand before and between calls. closers: end the calls of a trigger.
    args_mark: after a trigger, a call may be written NAME{...}, with this mark between; "": never so. Between the two
    may also stand id_mark and the call's id, or name_mark and its name, where what came before was only its kind.
    short_ids: ids are nine letters or digits, which the templates of such models insist on.
    native: the template describes the tools itself. in_system: as the key `tools` of its first message.
    before, between, after: the text around calls for the grammar; head and tail: that around the arguments of one,
    with NAME for its name.
    """

    name: Literal[
        "llama3", "hermes", "mistral", "mistral-args", "deepseek", "deepseek-v3.1", "cohere", "cohere-action", "phi4",
        "functools", "generic",
    ]  # fmt: skip
    trigger: str = ""
    bare: bool = False
    separators: tuple[str, ...] = ()
    closers: tuple[str, ...] = ()
    args_mark: str = ""
    id_mark: str = ""
    name_mark: str = ""
    short_ids: bool = False
    native: bool = True
    in_system: bool = False
    before: str = ""
    between: str | None = None  # None: one call an answer
    after: str = ""
    head: str = '{"name": "NAME", "arguments": '
    tail: str = "}"

    @property
    def tokens(self) -> tuple[str, ...]:
        """Strings that the parser must see though a tokenizer may have them as special tokens."""
        marks = (self.trigger, *self.separators, *self.closers, self.args_mark, self.id_mark, self.name_mark)
        return tuple(mark for mark in marks if len(mark) > 1)


LLAMA3 = ToolFormat(
    "llama3",
    trigger="<|python_tag|>",
    bare=True,
    separators=(";", ","),
    between="; ",
    head='{"name": "NAME", "parameters": ',
)
HERMES = ToolFormat(
    "hermes",
    trigger="<tool_call>",
    closers=("</tool_call>",),
    before="<tool_call>\n",
    between="\n</tool_call>\n<tool_call>\n",
    after="\n</tool_call>",
)
MISTRAL = ToolFormat(
    "mistral",
    trigger="[TOOL_CALLS]",
    separators=("[", ","),
    closers=("]",),
    args_mark="[ARGS]",
    id_mark="[CALL_ID]",
    short_ids=True,
    before="[TOOL_CALLS][",
    between=", ",
    after="]",
)
MISTRAL_ARGS = ToolFormat(
    "mistral-args",
    trigger="[TOOL_CALLS]",
    separators=("[", ","),
    closers=("]",),
    args_mark="[ARGS]",
    id_mark="[CALL_ID]",
    short_ids=True,
    before="[TOOL_CALLS]",
    between="[TOOL_CALLS]",
    head="NAME[ARGS]",
    tail="",
)
_DEEPSEEK_CALL, _DEEPSEEK_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
DEEPSEEK = ToolFormat(
    "deepseek",
    trigger="<｜tool▁calls▁begin｜>",
    separators=(_DEEPSEEK_CALL, "```", _DEEPSEEK_END),
    closers=("<｜tool▁calls▁end｜>",),
    args_mark="```json",
    name_mark="<｜tool▁sep｜>",
    before="<｜tool▁calls▁begin｜>",
    between="\n",
    after="<｜tool▁calls▁end｜>",
    head=f"{_DEEPSEEK_CALL}function<｜tool▁sep｜>NAME\n```json\n",
    tail=f"\n```{_DEEPSEEK_END}",
)
DEEPSEEK_V31 = replace(
    DEEPSEEK,
    name="deepseek-v3.1",
    between="",
    head=f"{_DEEPSEEK_CALL}NAME<｜tool▁sep｜>",
    tail=_DEEPSEEK_END,
)
# Command R7B and Command A, and the Command R models before them.
COHERE = ToolFormat(
    "cohere",
    trigger="<|START_ACTION|>",
    separators=("[", ",", "]"),
    closers=("<|END_ACTION|>",),
    before="<|START_ACTION|>[\n    ",
    between=",\n    ",
    after="\n]<|END_ACTION|>",
    head='{"tool_call_id": "0", "tool_name": "NAME", "parameters": ',
)
COHERE_ACTION = ToolFormat(
    "cohere-action",
    trigger="Action:",
    separators=("```json", "[", ",", "]"),
    closers=("```",),
    before="Action: ```json\n[\n    ",
    between=",\n    ",
    after="\n]```",
    head='{"tool_name": "NAME", "parameters": ',
)
PHI4 = ToolFormat(
    "phi4",
    trigger="<|tool_call|>",
    separators=("[", ",", "]"),
    closers=("<|/tool_call|>",),
    in_system=True,
    before="<|tool_call|>[",
    between=", ",
    after="]<|/tool_call|>",
)
FUNCTOOLS = ToolFormat(
    "functools",
    trigger="functools",
    separators=("[", ","),
    closers=("]",),
    before="functools[",
    between=", ",
    after="]",
)
# For models that know nothing of tools: forced, they make one call, for they would not know when to stop.
GENERIC = ToolFormat("generic", bare=True, separators=("[", ",", ";", "```json"), closers=("]", "```"), native=False)

# Phi-4-mini's template takes the tools from the system message.
_PHI4 = re.compile(r"""<\|tool\|>.*message\[['"]tools['"]\]""", re.DOTALL)


def detect(source: str, uses_tools: bool) -> ToolFormat:
    """The format that a chat template teaches its model; GENERIC where it knows nothing of tools or another format.

    uses_tools: whether the template reads the variable `tools`.
    """
    if _PHI4.search(source):
        return PHI4
    if DEEPSEEK.trigger in source:
        found = DEEPSEEK if "```json" in source else DEEPSEEK_V31
        # Most of these templates show the calls of earlier turns and no tools: those are described as to any model.
        return found if uses_tools else replace(found, bare=True, native=False)
    if not uses_tools or "<function=" in source:
        return GENERIC
    if "[TOOL_CALLS]" in source:
        return MISTRAL_ARGS if MISTRAL_ARGS.args_mark in source else MISTRAL
    if "<tool_call>" in source:
        return HERMES
    if COHERE.trigger in source:
        return COHERE
    if "tool_name" in source and COHERE_ACTION.trigger in source:
        return COHERE_ACTION
    if "functools" in source:
        return FUNCTOOLS
    if "<|python_tag|>" in source or "ipython" in source:
        return LLAMA3
    return GENERIC


def shown_ids(tokenizer: Tokenizer, strings: Iterable[str]) -> frozenset[int]:
    """The special tokens among the strings: those that a text stream must not hide."""
    ids = (tokenizer.backend.token_to_id(string) for string in strings)
    return frozenset(i for i in ids if i is not None and i in tokenizer.special_ids)
