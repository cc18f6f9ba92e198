"""Every form that prompts come in: separators, tables, templates, conversations; and what is wrong with them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from penstock.batch.rows import Format, Row, RowFile, RowShape
from penstock.batch.templates import PromptTemplate
from penstock.errors import EnvironmentFault, UsageError


def read(path: Path, content: str | bytes, form: Format = "auto", **shape: str) -> list[Row]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    file = RowFile(path, form, RowShape(**shape))
    found = file.check()
    rows = list(file)
    file.close()
    assert found.rows == len(rows) == len(found.keys)
    return rows


def pairs(rows: list[Row]) -> list[tuple[object, str | None]]:
    return [(row.id, row.prompt) for row in rows]


@pytest.mark.parametrize(
    ("text", "separator"),
    [
        ("one\ntwo\n\nthree\n\n\n\nfour", r"\n\n"),
        ("\ufeffone\r\ntwo\r\n\r\nthree\r\n\r\n\r\n\r\nfour\r\n", r"\n\n"),
        ("one\ntwo\n---\nthree\n---\n---\nfour\n---\n", "---"),
        ("one\ntwo\0three\0\0four", r"\0"),
    ],
)
def test_prompts_of_several_lines(tmp_path: Path, text: str, separator: str) -> None:
    assert pairs(read(tmp_path / "p.txt", text, separator=separator)) == [(1, "one\ntwo"), (2, "three"), (4, "four")]


def test_a_separator_across_chunks(tmp_path: Path) -> None:
    prompts = [f"{'ü' * 30_000}{n}" for n in range(20)]
    assert [row.prompt for row in read(tmp_path / "p", "<END>".join(prompts), separator="<END>")] == prompts


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("prompt\nOne, two\n", None),
        ('id,prompt\n7,"One, ""two"""\n,x\n', [("7", 'One, "two"'), (3, "x")]),
        ('\ufefftext,id\r\n"two\r\nlines",a\r\nlast,b', [("a", "two\r\nlines"), ("b", "last")]),
        ("id;prompt\n1;One, two\n\n2;Zwei\n", [("1", "One, two"), ("2", "Zwei")]),
        ("question\nWhy?\n", [(2, "Why?")]),
    ],
)
def test_csv(tmp_path: Path, content: str, rows: list[tuple[object, str]] | None) -> None:
    if rows is None:
        with pytest.raises(UsageError, match="line 2: it has 2 cells, but there are 1 columns"):
            read(tmp_path / "p.csv", content)
    else:
        assert pairs(read(tmp_path / "p.csv", content)) == rows


def test_tsv_columns_and_templates(tmp_path: Path) -> None:
    table = "key\tword\tlang\nk1\tcat\tFrench\nk2\tdog\tGerman\n"
    shape = {"template": "{{{word}}} in {lang}:", "id_column": "key"}
    assert pairs(read(tmp_path / "p.tsv", table, **shape)) == [("k1", "{cat} in French:"), ("k2", "{dog} in German:")]
    assert pairs(read(tmp_path / "p.tsv", table, column="word")) == [(2, "cat"), (3, "dog")]


@pytest.mark.parametrize(
    ("name", "content", "shape", "words"),
    [
        ("p.csv", "a,b\n1,2\n", {}, "line 2: which column has the prompts is not clear; it has a, b"),
        ("p.csv", "a,b\n1,2\n", {"column": "c"}, "there is no column 'c'"),
        ("p.csv", "a,a\n1,2\n", {}, "two columns named 'a'"),
        ("p.csv", 'prompt\n"never ends\n', {}, "line 2: it is not CSV"),
        ("p.csv", b"prompt\nfine\nb\xe4d\n", {}, "line 3: it is not UTF-8"),
        ("p.csv", "id,prompt\n1,a\n1,b\n", {}, "line 3: the id '1' is that of line 2 already"),
        ("p.csv", "key,prompt\n,a\n", {"id_column": "key"}, "its key is empty"),
        ("p.csv", "", {}, "holds no prompts"),
        ("p.txt", "x\n", {"column": "c"}, "is no table"),
        ("p.jsonl", '{"a": 1}\n', {"template": "{b}"}, "line 1: it has no 'b', which the template wants; it has a"),
        ("p.jsonl", '{"messages": 3}\n', {}, "messages"),
        ("p.jsonl", '{"messages": [], "prompt": "x"}\n', {}, "both prompt and messages"),
        ("p.txt", "x\n", {"separator": ""}, "cannot be empty"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, name: str, content: str | bytes, shape: dict[str, str], words: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read(tmp_path / name, content, **shape)
    assert words in str(caught.value)


def test_json_rows_of_a_template_keep_their_parameters(tmp_path: Path) -> None:
    lines = [{"id": "a", "text": "x", "temperature": 0.5, "note": 1}, {"text": {"b": [1, None]}, "seed": 3}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    rows = read(tmp_path / "p.jsonl", text, template="<{text}>")
    assert pairs(rows) == [("a", "<x>"), (2, '<{"b":[1,null]}>')]
    assert (rows[0].temperature, rows[1].seed) == (0.5, 3)


@pytest.mark.parametrize(
    "source",
    ["{text.__class__}", "{text[0]}", "{text!r}", "{text:>9}", "{}", "{0.a}", "{te{x}t}", "{open", "no columns", "}"],
)
def test_templates_reach_nothing_but_columns(source: str) -> None:
    with pytest.raises(UsageError, match="template"):
        PromptTemplate(source)


def test_what_is_filled_in_is_not_a_template() -> None:
    assert PromptTemplate("{a} {b}").fill({"a": "{b.__class__}", "b": "{a}"}) == "{b.__class__} {a}"


def test_conversations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    rows = read(tmp_path / "p.jsonl", json.dumps({"messages": messages, "n": 2}) + "\n")
    assert (rows[0].messages, rows[0].n, rows[0].prompt) == (messages, 2, None)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    table = pyarrow.table({"id": [3, 4, 5], "prompt": ["a", None, "ü"], "n": [1.5, 2.5, None]})
    parquet.write_table(table, path, row_group_size=2)
    data = path.read_bytes()
    assert pairs(read(path, data)) == [(3, "a"), (4, ""), (5, "ü")]
    assert pairs(read(tmp_path / "named-otherwise", data, column="prompt")) == [(3, "a"), (4, ""), (5, "ü")]
    with pytest.raises(UsageError, match="line 3: it has no 'n'"):
        read(path, data, template="{n} {id}")
    with pytest.raises(UsageError, match="its n is no text"):
        read(path, data, column="n")
    with pytest.raises(UsageError, match="no Parquet file"):
        read(path, data[:50] + b"PAR1")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(EnvironmentFault, match=r"penstock\[parquet\]"):
        read(tmp_path / "p.parquet", b"PAR1")


def test_a_rows_identity_is_its_content() -> None:
    row = Row(id="a", prompt="x", temperature=0.5)
    same = Row(temperature=0.5, prompt="x", id="a")
    assert row.identity() == same.identity()
    others = [
        Row(id="b", prompt="x", temperature=0.5),
        Row(id="a", prompt="y", temperature=0.5),
        Row(id="a", prompt="x"),
        Row(id="a", prompt_token_ids=[1], temperature=0.5),
    ]
    assert len({row.identity(), *(other.identity() for other in others)}) == 5
