"""The grammar of an answer that has to be a tool call, in the model's own way of writing calls."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from penstock.text.grammar import GrammarRefused, GrammarSpec
from penstock.text.grammar_schema import SchemaFault, prepare
from penstock.text.reasoning import ThinkTags
from penstock.text.tools_format import ToolFormat

if TYPE_CHECKING:
    from penstock.text.tokenizer import Tokenizer

# The white space that json.dumps writes, which is what the models' templates show them. No \uXXXX escapes, which could
# spell a known key differently.
_JSON = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "json_allowed_escapes": 'nrbtf\\"',
}

_OPENING = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}  # may add properties


def tool_grammar(
    tools: Mapping[str, dict[str, Any]],
    format: ToolFormat,
    parallel: bool,
    tokenizer: Tokenizer,
    tags: ThinkTags | None = None,
    opened: bool = False,
) -> GrammarSpec:
    """A Lark grammar for one call or, if `parallel`, several.

    tools: the schema of each one's arguments, by name. tags: reasoning may stand before; it must where it is `opened`.
    Raises GrammarRefused for a schema that cannot be followed.
    """
    marks = [*format.tokens, *((tags.open, tags.close) if tags else ())]
    writer = _Writer({mark: i for mark in marks if (i := _special(tokenizer, mark)) is not None}, marks)
    several = parallel and format.between is not None
    between = writer.literal(format.between or "")
    parts = ["reasoning" if opened else "reasoning?"] if tags else []
    parts += [writer.literal(format.before), f"call ({between} call)*" if several else "call"]
    parts.append(writer.literal(format.after))
    lines = [f"start: {' '.join(filter(None, parts))}"]
    if tags:
        lines += writer.reasoning(tags, opened)
    lines.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, (name, schema) in enumerate(tools.items()):
        arguments = f"%json {json.dumps({**_prepared(name, schema), 'x-guidance': _JSON})}"
        head = writer.literal(format.head.replace("NAME", name))
        lines.append(f"call_{i}: {head} {arguments} {writer.literal(format.tail)}")
    return GrammarSpec("lark", "\n".join(lines))


def _prepared(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A schema as the grammar takes it. Raises GrammarRefused."""
    try:
        return prepare(copy.deepcopy(_closed(schema)))
    except SchemaFault as fault:
        where = f"`{fault.keyword}` at {fault.pointer or 'the top'} of the parameters of {name!r}"
        raise GrammarRefused(f"grammar is not valid: {where}: {fault.why}", fault.pointer) from None


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A tool that lists its arguments and says nothing of others takes no others, as with TGI and vLLM.

    JSON schema would allow any, and small models then go on inventing them until the limit of tokens.
    """
    if schema.get("properties") and not schema.keys() & _OPENING:
        return {**schema, "additionalProperties": False}
    return schema


class _Writer:
    """Writes text as terms of a grammar: special tokens by their ids, the rest as strings."""

    def __init__(self, special: Mapping[str, int], marks: list[str]) -> None:
        self._special = special
        self._marks = re.compile("|".join(f"({re.escape(mark)})" for mark in marks)) if marks else None

    def literal(self, text: str) -> str:
        terms: list[str] = []
        at = 0
        for match in self._marks.finditer(text) if self._marks else ():
            if match.group() in self._special:
                terms += (_quoted(text[at : match.start()]), f"<[{self._special[match.group()]}]>")
                at = match.end()
        terms.append(_quoted(text[at:]))
        return " ".join(filter(None, terms))

    def reasoning(self, tags: ThinkTags, opened: bool) -> list[str]:
        """The rules for what stands before the call."""
        opening = "" if opened else self.literal(tags.open)
        if tags.close in self._special:
            thought = [r"thought: /(?s:.*)/ " + self.literal(tags.close)]
        else:  # a string: the thought ends where it first stands
            close = re.escape(tags.close).replace("/", r"\/")
            thought = [f"thought[lazy]: /(?s:.*){close}/"]
        return [f"reasoning: {opening} thought /[ \\r\\n\\t]*/", *thought]


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""


def _special(tokenizer: Tokenizer, text: str) -> int | None:
    """The id of a special token, which an output contains only as that token."""
    token_id = tokenizer.backend.token_to_id(text)
    added = tokenizer.backend.get_added_tokens_decoder()
    return token_id if token_id in added and added[token_id].special else None
