"""Stop strings: the same answer however the text is cut, and nothing beyond them is ever let out.

PENSTOCK_LONG_TESTS=1 makes it 10,000 texts a test.
"""

from __future__ import annotations

import os
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text.stops import StopMatcher
from penstock.text.stream import TextStream

from .made import BYTE_LEVEL

LONG = os.environ.get("PENSTOCK_LONG_TESTS") == "1"
letters = st.text(alphabet="ab<", max_size=30)
stops = st.lists(st.text(alphabet="ab<", max_size=5), max_size=4)


def first_match(text: str, patterns: list[str]) -> tuple[int, int] | None:
    """By definition: the stop string that ends first, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        starts = [end - len(p) for p in patterns if p and text[:end].endswith(p)]
        if starts:
            return min(starts), end
    return None


@settings(max_examples=10_000 if LONG else 500, deadline=None)
@given(text=letters, patterns=stops, data=st.data())
def test_the_match_does_not_depend_on_the_cuts(text: str, patterns: list[str], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    matcher = StopMatcher(patterns)
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        matcher.push(text[begin:end])
    expected = first_match(text, patterns)
    found = None if matcher.end is None else (matcher.start, matcher.end)
    assert found == expected


@settings(max_examples=10_000 if LONG else 500, deadline=None)
@given(text=letters, patterns=stops, include=st.booleans())
def test_streamed_text_stops_where_it_must(text: str, patterns: list[str], include: bool) -> None:
    ids = BYTE_LEVEL.encode(text)
    stream = TextStream(BYTE_LEVEL, [], patterns, include_stop=include)
    match = first_match(text, patterns)
    final = text if match is None else text[: match[1] if include else match[0]]
    out = ""
    for i in ids:
        out += stream.push(i)
        assert final.startswith(out), "text was let out that does not belong to the answer"
        if stream.stopped:
            break
    out += stream.finish()
    assert out == final == stream.text
    assert stream.stopped == (match is not None)


def test_the_stop_string_stays_and_the_text_after_it_goes() -> None:
    """A stop string in the middle of a token's text."""
    matcher_text = "the cat sat"
    ids = BYTE_LEVEL.encode(matcher_text)
    stream = TextStream(BYTE_LEVEL, [], ["cat s"])
    shown = []
    for i in ids:
        stream.push(i)
        shown.append(stream.shown)
        if stream.stopped:
            break
    assert stream.text == "the cat s" == "".join(shown)


def test_a_special_token_can_be_a_stop_string() -> None:
    stream = TextStream(BYTE_LEVEL, [], ["</s>"], include_stop=False)
    for i in [*BYTE_LEVEL.encode("the cat"), BYTE_LEVEL.eos_id or 0]:
        stream.push(i)
    assert stream.stopped
    assert stream.text + stream.finish() == "the cat"


def test_linear_time_with_hostile_stop_strings() -> None:
    matcher = StopMatcher(["a" * 100_000 + "b", "a" * 1000 + "c"])
    began = time.monotonic()
    for _ in range(100_000):
        matcher.push("a")
    assert matcher.end is None
    assert matcher.seen - matcher.safe == 100_000
    assert time.monotonic() - began < 2


def test_without_stop_strings_nothing_is_held() -> None:
    stream = TextStream(BYTE_LEVEL, [], [], include_stop=False)
    assert [stream.push(i) for i in BYTE_LEVEL.encode("the")] != [""]
    assert stream.finish() == ""
