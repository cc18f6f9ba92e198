"""The split of reasoning from answers."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text.answer import AnswerParser, joined, whole
from penstock.text.answer_events import Event
from penstock.text.reasoning import ReasoningSplitter, ThinkTags, think_tags

THINK = ThinkTags("<think>", "</think>")
MAGIC = ThinkTags("[THINK]", "[/THINK]")

# (tags, whether the prompt opened them, answer, reasoning, content)
CASES = [
    (THINK, False, "Hello", None, "Hello"),
    (THINK, False, "<think>\nHm.\nYes.\n</think>\n\nHello\n", "Hm.\nYes.", "Hello\n"),
    (THINK, True, "\nHm.\n</think>\n\nHello", "Hm.", "Hello"),
    (THINK, True, "Hm. </thin", "Hm. </thin", ""),
    (THINK, False, "<think>\n\n</think>\n\nHello", None, "Hello"),
    (THINK, False, "\n <think>a</think>b", "a", "b"),
    (THINK, False, "<thinking>a</think>", None, "<thinking>a</think>"),
    (THINK, False, " <thi", None, " <thi"),
    (THINK, False, "a <think>b</think>", None, "a <think>b</think>"),
    (THINK, False, "<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
    (THINK, False, "<think>a < b </ c</think></think>", "a < b </ c", "</think>"),
    (THINK, False, " \n", None, " \n"),
    (THINK, True, "</think>Hello", None, "Hello"),
    (MAGIC, False, "[THINK]x [THIN[/THINK]y", "x [THIN", "y"),
]


def events(tags: ThinkTags, opened: bool, pieces: list[str]) -> list[Event]:
    parse = AnswerParser(ReasoningSplitter(tags, opened))
    found = [event for piece in pieces for event in parse.push(piece)]
    return joined([*found, *parse.finish()])


def cut(text: str, at: list[int]) -> list[str]:
    return [text[a:b] for a, b in itertools.pairwise([0, *sorted(at), len(text)])]


@pytest.mark.parametrize(("tags", "opened", "text", "reasoning", "content"), CASES, ids=range(len(CASES)))
def test_split(tags: ThinkTags, opened: bool, text: str, reasoning: str | None, content: str) -> None:
    expected = events(tags, opened, [text])
    answer = whole(expected)
    assert (answer.reasoning, answer.content) == (reasoning, content)
    draw = random.Random(3)
    assert events(tags, opened, list(text)) == expected
    for _ in range(200):
        assert events(tags, opened, cut(text, [draw.randrange(len(text) + 1) for _ in range(4)])) == expected


@settings(max_examples=400, deadline=None)
@given(
    st.booleans(),
    st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think", ">", " ", "\n", "a"]), max_size=16),
    st.data(),
)
def test_any_text_cut_in_any_way(opened: bool, pieces: list[str], data: st.DataObject) -> None:
    text = "".join(pieces)
    at = data.draw(st.lists(st.integers(0, len(text)), max_size=8))
    found = events(THINK, opened, [text])
    assert events(THINK, opened, cut(text, at)) == found
    answer = whole(found)
    rest = text
    if opened or text.lstrip().startswith("<think>"):
        before, _, after = (text if opened else text.lstrip().removeprefix("<think>")).partition("</think>")
        rest = before + after
    kept = (answer.reasoning or "") + (answer.content or "")
    assert "".join(kept.split()) == "".join(rest.split())  # nothing but the tags and space is lost


def test_reasoning_streams() -> None:
    parse = AnswerParser(ReasoningSplitter(THINK, opened=True))
    assert [event.text for event in parse.push("One two </")] == ["One two"]  # type: ignore[union-attr]
    assert [event.text for event in parse.push("three")] == [" </three"]  # type: ignore[union-attr]
    assert parse.push("\n</think>\n") == []


def test_the_tags_of_templates_and_prompts() -> None:
    assert think_tags("{{ '<think>\\n' }}") == THINK
    assert think_tags("... [THINK] ...") == MAGIC
    assert think_tags("{{ messages }}") is None
    assert THINK.opened_by("<|assistant|><think>\n")
    assert not THINK.opened_by("<|assistant|><think>\n\n</think>\n\n")
