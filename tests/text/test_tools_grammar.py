"""Grammars that force a call: what a model may then write is read as a call by the parser."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from penstock.text.answer import AnswerParser, whole
from penstock.text.grammar import GrammarRefused
from penstock.text.reasoning import ReasoningSplitter, ThinkTags
from penstock.text.tokenizer import Tokenizer
from penstock.text.tools_format import (
    COHERE,
    COHERE_ACTION,
    DEEPSEEK,
    DEEPSEEK_V31,
    FUNCTOOLS,
    GENERIC,
    HERMES,
    LLAMA3,
    MISTRAL,
    MISTRAL_ARGS,
    PHI4,
    ToolFormat,
    shown_ids,
)
from penstock.text.tools_grammar import tool_grammar
from penstock.text.tools_parser import ToolParser

THINK = ThinkTags("<think>", "</think>")
TOOLS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"type": "integer", "maximum": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "f": {"type": "object", "properties": {}, "additionalProperties": False},
}
ARGUMENTS = '{"city": "O}s\\"lo", "days": 3}'
MARKS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "<|START_ACTION|>", "<|END_ACTION|>", "<|tool_call|>", "<|/tool_call|>",
]  # fmt: skip
FORMATS = [
    LLAMA3, HERMES, MISTRAL, MISTRAL_ARGS, DEEPSEEK, DEEPSEEK_V31, COHERE, COHERE_ACTION, PHI4, FUNCTOOLS, GENERIC,
]  # fmt: skip


def tokenizer(special: list[str]) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(['{"name": "get_weather", "arguments": {}}'], trainer)
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in special])
    return Tokenizer(backend, {"eos_token": "</s>"}, None)


PLAIN, SPECIAL = tokenizer([]), tokenizer(MARKS)
KINDS = {
    id(kind): LLTokenizer(kind.backend.to_str(), n_vocab=len(kind), eos_token=kind.eos_id) for kind in (PLAIN, SPECIAL)
}


def matcher(kind: Tokenizer, lark: str) -> LLMatcher:
    found = LLMatcher(KINDS[id(kind)], LLMatcher.grammar_from_lark(lark))
    assert not found.is_error(), found.get_error()
    return found


def accepts(kind: Tokenizer, lark: str, text: str) -> bool:
    ids = kind.encode(text, add_special_tokens=False)
    found = matcher(kind, lark)
    return found.validate_tokens(ids) == len(ids) and found.consume_tokens(ids) and found.is_accepting()


def written(format: ToolFormat, calls: list[tuple[str, str]]) -> str:
    """Calls as the format writes them."""
    texts = [format.head.replace("NAME", name) + arguments + format.tail for name, arguments in calls]
    return format.before + (format.between or "").join(texts) + format.after


@pytest.mark.parametrize("kind", [PLAIN, SPECIAL], ids=["plain", "special"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_what_the_format_writes_is_taken(format: ToolFormat, kind: Tokenizer) -> None:
    one, two = [("get_weather", ARGUMENTS)], [("get_weather", ARGUMENTS), ("f", "{}")]
    lark = tool_grammar(TOOLS, format, True, kind).value
    assert accepts(kind, lark, written(format, one))
    assert accepts(kind, lark, written(format, two)) == (format is not GENERIC)
    for wrong in ("", "Hello", written(format, [("g", "{}")]), written(format, [("f", '{"a": 1}')])):
        assert not accepts(kind, lark, wrong)
    assert not accepts(kind, lark, "<think>x</think>" + written(format, one))
    single = tool_grammar(TOOLS, format, False, kind).value
    assert accepts(kind, single, written(format, one))
    assert not accepts(kind, single, written(format, two))


@pytest.mark.parametrize("kind", [PLAIN, SPECIAL], ids=["plain", "special"])
def test_reasoning_may_stand_before(kind: Tokenizer) -> None:
    call = written(HERMES, [("f", "{}")])
    asked = tool_grammar(TOOLS, HERMES, True, kind, THINK).value
    assert accepts(kind, asked, call)
    assert accepts(kind, asked, "<think>\nA </ think of 3 < 4\n</think>\n\n" + call)
    assert not accepts(kind, asked, "<think>\nno end" + call)
    opened = tool_grammar(TOOLS, HERMES, True, kind, THINK, opened=True).value
    assert accepts(kind, opened, "\nAnything.\n</think>\n\n" + call)
    assert not accepts(kind, opened, call)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("kind", [PLAIN, SPECIAL], ids=["plain", "special"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_whatever_the_grammar_lets_out_is_a_call(format: ToolFormat, kind: Tokenizer, thinking: bool) -> None:
    draw = random.Random(f"{format.name} {thinking}")
    lark = tool_grammar(TOOLS, format, False, kind, THINK if thinking else None, opened=thinking).value
    shown = shown_ids(kind, [*format.tokens, THINK.open, THINK.close])
    for _ in range(5):
        text = generated(kind, lark, shown, draw, "So </thin.\n</think>\n\n" if thinking else "")
        splitter = ReasoningSplitter(THINK, opened=True) if thinking else None
        parse = AnswerParser(splitter, ToolParser(format, list(TOOLS)))
        answer = whole([*parse.push(text), *parse.finish()])
        assert answer.content is None, text
        (call,) = answer.calls
        arguments = json.loads(call.arguments)
        assert set(arguments) <= set(TOOLS[call.name]["properties"])
        assert set(arguments) >= set(TOOLS[call.name].get("required", []))


def generated(kind: Tokenizer, lark: str, shown: frozenset[int], draw: random.Random, thought: str) -> str:
    """A thought, and tokens drawn at random from what the grammar allows then, until it may end."""
    found, ids = matcher(kind, lark), kind.encode(thought, add_special_tokens=False)
    assert found.consume_tokens(ids)
    mask = allocate_token_bitmask(1, len(kind))
    quote = kind.backend.token_to_id('"')
    while not found.is_accepting():
        fill_next_token_bitmask(found, mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(kind)]
        allowed = [int(i) for i in np.flatnonzero(bits) if i != kind.eos_id]
        if quote in allowed and len(ids) > 60:  # strings have to end some day
            allowed = [quote]
        ids.append(draw.choice(allowed))
        assert found.consume_token(ids[-1])
        assert len(ids) < 1000
    return kind.decode([i for i in ids if i in shown or i not in kind.special_ids], skip_special_tokens=False)


def test_a_schema_that_cannot_be_followed_is_named() -> None:
    bad = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    with pytest.raises(GrammarRefused, match="`uniqueItems` at /properties/a/uniqueItems of the parameters of 'f'"):
        tool_grammar({"f": bad}, HERMES, True, PLAIN)


def test_references_stay_within_their_tool() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/small"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"small": {"enum": [1, 2]}},
    }
    other = {**schema, "$defs": {"small": {"enum": ["x"]}}}
    lark = tool_grammar({"f": schema, "g": other}, HERMES, True, PLAIN).value
    assert accepts(PLAIN, lark, written(HERMES, [("f", '{"a": 1}'), ("g", '{"a": "x"}')]))
    assert not accepts(PLAIN, lark, written(HERMES, [("f", '{"a": "x"}')]))
