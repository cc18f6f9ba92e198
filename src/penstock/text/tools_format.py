"""How a model writes tool calls, told from its chat template."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from penstock.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ToolFormat:
    """One way of writing calls, as the parser and the grammar use it.

    trigger: begins calls, anywhere in the answer; what follows must be one. "": there is none.
    bare: an answer that begins as JSON is a call too, if it has the name of a tool.
    separators: may stand before and between calls. closers: end the calls of a trigger.
    named: after a trigger, a call may be written NAME[ARGS]{...}, with [CALL_ID]ID after the name.
    short_ids: ids are nine letters or digits, which the templates of such models insist on.
    native: the template describes the tools itself. before, between, after: the text around calls for the grammar,
    with the key of the arguments.
    """

    name: Literal["llama3", "hermes", "mistral", "mistral-args", "generic"]
    trigger: str = ""
    bare: bool = False
    separators: tuple[str, ...] = ()
    closers: tuple[str, ...] = ()
    named: bool = False
    short_ids: bool = False
    native: bool = True
    before: str = ""
    between: str | None = None  # None: one call an answer
    after: str = ""
    key: str = "arguments"

    @property
    def tokens(self) -> tuple[str, ...]:
        """Strings that the parser must see though a tokenizer may have them as special tokens."""
        marks = (self.trigger, *self.closers, *(NAMED_MARKS if self.named else ()))
        return tuple(mark for mark in marks if len(mark) > 1)


CALL_ID, ARGS = "[CALL_ID]", "[ARGS]"
NAMED_MARKS = (CALL_ID, ARGS)

LLAMA3 = ToolFormat(
    "llama3", trigger="<|python_tag|>", bare=True, separators=(";", ","), key="parameters", between="; "
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
    named=True,
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
    named=True,
    short_ids=True,
    before="[TOOL_CALLS]",
    between="[TOOL_CALLS]",
)
# For models that know nothing of tools: forced, they make one call, for they would not know when to stop.
GENERIC = ToolFormat("generic", bare=True, separators=("[", ",", ";", "```json"), closers=("]", "```"), native=False)


def detect(source: str, uses_tools: bool) -> ToolFormat:
    """The format that a chat template teaches its model; GENERIC where it knows nothing of tools or another format.

    uses_tools: whether the template reads the variable `tools`.
    """
    if not uses_tools or "<function=" in source:
        return GENERIC
    if "[TOOL_CALLS]" in source:
        return MISTRAL_ARGS if ARGS in source else MISTRAL
    if "<tool_call>" in source:
        return HERMES
    if "<|python_tag|>" in source or "ipython" in source:
        return LLAMA3
    return GENERIC


def shown_ids(tokenizer: Tokenizer, strings: Iterable[str]) -> frozenset[int]:
    """The special tokens among the strings: those that a text stream must not hide."""
    ids = (tokenizer.backend.token_to_id(string) for string in strings)
    return frozenset(i for i in ids if i is not None and i in tokenizer.special_ids)
