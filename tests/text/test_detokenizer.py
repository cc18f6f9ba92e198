"""Incremental decoding equals decoding at once, for any sequence of ids.

PENSTOCK_LONG_TESTS=1 makes it 10,000 sequences a test.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text.stream import TextStream
from penstock.text.tokenizer import Tokenizer

from .made import BYTE0, BYTE_LEVEL, GEMMA, LLAMA, METASPACE, METASPACE_NEVER, WORDPIECE, vocabulary

LONG = os.environ.get("PENSTOCK_LONG_TESTS") == "1"


def streamed(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> str:
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(i) for i in ids]
    pieces.append(stream.finish())
    assert stream.text == "".join(pieces)
    return stream.text


def valid_runs(ids: list[int]) -> bool:
    """Whether every run of byte tokens is UTF-8;

    in others Penstock keeps the valid characters, the library none.
    """
    run = bytearray()
    for i in [*ids, -1]:
        if BYTE0 <= i < BYTE0 + 256:
            run.append(i - BYTE0)
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            return False
        run.clear()
    return True


@settings(max_examples=10_000 if LONG else 400, deadline=None)
@given(st.lists(st.integers(0, len(BYTE_LEVEL) + 3), max_size=40))
def test_byte_level_equals_the_library(ids: list[int]) -> None:
    visible = [i for i in ids if i not in BYTE_LEVEL.special_ids]
    expected = BYTE_LEVEL.backend.decode(visible, skip_special_tokens=True)
    assert BYTE_LEVEL.decode(ids) == expected
    assert streamed(BYTE_LEVEL, ids, []) == expected


text_bytes = st.text(max_size=6).map(lambda t: [BYTE0 + b for b in t.encode("utf-8", "ignore")])
pieces = st.one_of(text_bytes, st.lists(st.integers(259, 272), max_size=4), st.lists(st.integers(0, 2), max_size=1))
valid = st.lists(pieces, max_size=8).map(lambda parts: [i for part in parts for i in part])


@pytest.mark.parametrize("tokenizer", [LLAMA, GEMMA], ids=["llama", "gemma"])
@settings(max_examples=10_000 if LONG else 300, deadline=None)
@given(ids=valid)
def test_byte_fallback_equals_the_library(tokenizer: Tokenizer, ids: list[int]) -> None:
    visible = [i for i in ids if i not in tokenizer.special_ids]
    if not valid_runs(visible):
        return
    expected = tokenizer.backend.decode(visible, skip_special_tokens=True)
    assert tokenizer.decode(ids) == expected
    assert streamed(tokenizer, ids, []) == expected


@pytest.mark.parametrize("tokenizer", [METASPACE, METASPACE_NEVER, WORDPIECE], ids=["metaspace", "never", "wordpiece"])
@settings(max_examples=10_000 if LONG else 200, deadline=None)
@given(ids=st.lists(st.integers(0, 275), max_size=20))
def test_other_decoders_equal_the_library(tokenizer: Tokenizer, ids: list[int]) -> None:
    visible = [i for i in ids if i not in tokenizer.special_ids]
    assert streamed(tokenizer, ids, []) == tokenizer.backend.decode(visible, skip_special_tokens=True)


@pytest.mark.parametrize("tokenizer", [LLAMA, GEMMA, METASPACE, BYTE_LEVEL], ids=["llama", "gemma", "meta", "bytes"])
@settings(max_examples=10_000 if LONG else 300, deadline=None)
@given(ids=st.lists(st.integers(0, 275), max_size=40), prompt=st.sampled_from([[], [1], [1, 260]]))
def test_streaming_equals_one_shot_for_any_ids(tokenizer: Tokenizer, ids: list[int], prompt: list[int]) -> None:
    continues = any(i not in tokenizer.special_ids for i in prompt)
    assert streamed(tokenizer, ids, prompt) == tokenizer.decode(ids, continues=continues)


def test_a_character_comes_whole_with_its_last_token() -> None:
    stream = TextStream(LLAMA, [1, 260])
    pushed = [stream.push(BYTE0 + b) for b in "🦝".encode()]
    assert pushed == ["", "", "", "🦝"]
    assert stream.finish() == ""


def test_a_character_cut_off_at_the_end_is_shown_as_the_library_shows_it() -> None:
    ids = [BYTE0 + b for b in "🦝".encode()[:2]]
    assert streamed(LLAMA, ids, []) == LLAMA.backend.decode(ids) == "\ufffd\ufffd"


def test_the_leading_space_goes_only_at_the_start_of_a_text() -> None:
    the = vocabulary()["▁the"]
    assert streamed(LLAMA, [the], []) == "the"
    assert streamed(LLAMA, [the], [1]) == "the"
    assert streamed(LLAMA, [the], [1, 260]) == " the"


def test_special_tokens_are_shown_but_not_part_of_the_text() -> None:
    stream = TextStream(BYTE_LEVEL, [5])
    eos = BYTE_LEVEL.eos_id
    assert eos is not None
    assert stream.push(eos) == ""
    assert stream.shown == "</s>"
    assert stream.text == ""
    raw = TextStream(BYTE_LEVEL, [5], skip_special_tokens=False)
    assert raw.push(eos) == "</s>"


def test_work_per_token_is_bounded() -> None:
    """Ten thousand broken bytes: nothing piles up that a later token would decode again."""
    stream = TextStream(BYTE_LEVEL, [])
    broken = BYTE_LEVEL.backend.token_to_id("Ģ")  # the byte 0x80
    held = [len(stream.push(broken)) for _ in range(10_000)]
    assert sum(held) + len(stream.finish()) == 10_000
    assert min(held) == 1
