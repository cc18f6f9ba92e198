"""Rows in: what is read, and the first bad line named before anything is generated."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.batch.parameters import Parameters, seed_of
from penstock.batch.rows import Row, RowFile
from penstock.errors import EnvironmentFault, InvalidRequest, UsageError
from tests.process import environment


def rows(path: Path, content: bytes | str) -> list[Row]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    file = RowFile(path)
    found = file.check()
    read = list(file)
    file.close()
    assert found.rows == len(read)
    return read


def test_text_lines_with_their_numbers(tmp_path: Path) -> None:
    read = rows(tmp_path / "p.txt", b'\xef\xbb\xbfone\r\n\n  two \n\t\n{"three": 3}')
    assert [(r.id, r.prompt) for r in read] == [(1, "one"), (3, "  two "), (5, '{"three": 3}')]


def test_jsonl_with_every_field(tmp_path: Path) -> None:
    read = rows(
        tmp_path / "p.jsonl",
        '{"id": "a", "prompt": "x", "temperature": 0, "top_k": 3, "top_p": 0.5, "typical_p": 0.9, "seed": 7, '
        '"repetition_penalty": 1.1, "frequency_penalty": -0.5, "do_sample": true, "watermark": false, '
        '"stop": ["\\n"], "ignore_eos": true, "max_new_tokens": 5}\n'
        "\n"
        '{"prompt_token_ids": [1, 2], "stop": "x", "temperature": null}\n',
    )
    assert [r.id for r in read] == ["a", 3]
    assert read[0].over(Parameters(max_new_tokens=9)).max_new_tokens == 5
    assert read[1].over(Parameters(max_new_tokens=9)).max_new_tokens == 9
    assert read[1].prompt_token_ids == [1, 2]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x"', "truncated"),
        ('{"prompt": "x"} {', "trailing"),
        ("prompt: x", "malformed"),
        ('["x"]', "expected 'object', got 'array'"),
        ('{"prompt": 3}', "expected 'str | null', got 'int' - at '$.prompt'"),
        ('{"prompt": "x", "max_new_tokens": "3"}', "'$.max_new_tokens'"),
        ('{"prompt": "x", "max_new_tokens": true}', "'$.max_new_tokens'"),
        ('{"prompt": "x", "temperature": NaN}', "NaN is not JSON"),
        ('{"prompt": "x", "temperature": -Infinity}', "Infinity is not JSON"),
        ('{"prompt": "x", "temperature": 1e999}', "out of range"),
        ('{"prompt": "x", "max_token": 3}', "unknown field 'max_token'; known are max_new_tokens"),
        ('{"id": 1}', "no prompt"),
        ('{"prompt": "x", "prompt_token_ids": [1]}', "both prompt and prompt_token_ids"),
        ('{"prompt_token_ids": [1, "2"]}', "got 'str' - at '$.prompt_token_ids["),
        ('{"prompt": "x", "id": "one"}', "id 'one' is that of line 1"),
        ('{"prompt": "x", "id": 1.5}', "'$.id'"),
        ('{"prompt": "x", "id": 99999999999999999999}', "64 bits"),
        ('{"prompt": ' + "[" * 100_000, "line 3"),
        ('{"prompt": "x", "stop": {"a": ' + '{"a":' * 100_000, "line 3"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        rows(tmp_path / "p.jsonl", f'{{"id": "one", "prompt": "good"}}\n\n{line}\n')
    text = str(caught.value)
    assert f"{tmp_path / 'p.jsonl'}, line 3: " in text
    assert words in text
    assert len(text) < 700


def test_a_row_without_id_may_not_take_a_given_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 2: the id 2 is that of line 1 already"):
        rows(tmp_path / "p.jsonl", '{"id": "2", "prompt": "x"}\n{"prompt": "x"}\n')


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_invalid_utf8_is_placed(tmp_path: Path, name: str) -> None:
    good = b"ok\n" if name == "p.txt" else b'{"prompt": "ok"}\n'
    bad = b"abc\xe9\n" if name == "p.txt" else b'{"prompt": "abc\xe9"}\n'
    with pytest.raises(UsageError, match=r"line 2: it is not UTF-8 \(byte \d+: 0xe9\)"):
        rows(tmp_path / name, good + bad)


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_no_prompts_at_all(tmp_path: Path, content: str) -> None:
    with pytest.raises(UsageError, match="no prompts"):
        rows(tmp_path / "p.txt", content)


def test_inputs_that_cannot_be_read(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "gone.txt", "does not exist"), (tmp_path, "is a folder")):
        with pytest.raises(EnvironmentFault, match=words):
            RowFile(path)
    os.symlink("loop", tmp_path / "loop")
    with pytest.raises(EnvironmentFault, match="cannot be read"):
        RowFile(tmp_path / "loop")


def test_a_large_file_is_not_read_into_memory(tmp_path: Path) -> None:
    """300 MB are checked and half of them iterated with less than 100 MB more address space than the imports take."""
    path = tmp_path / "big.txt"
    with path.open("wb") as file:
        line = b"x" * 1_000_000 + b"\n"
        for _ in range(300):
            file.write(line)
    script = (
        "import resource, itertools, sys; from pathlib import Path; from penstock.batch.rows import RowFile\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + 100_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "file = RowFile(Path(sys.argv[1]))\n"
        "print(file.check().rows, sum(len(r.prompt) for r in itertools.islice(file, 150)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=environment(tmp_path), capture_output=True, check=False
    )
    assert done.stdout.split() == [b"300", b"150000000"], done.stderr.decode()
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_many_rows_cost_eight_bytes_each(tmp_path: Path) -> None:
    """150,000 rows with ids are checked and read in 25 MB."""
    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        file.writelines(f'{{"id": "row-{n}", "prompt": "fox {n}"}}\n' for n in range(150_000))
    script = (
        "import resource, sys, numpy; from pathlib import Path; from penstock.batch.rows import RowFile\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + 25_000_000\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "file = RowFile(Path(sys.argv[1]))\n"
        "print(len(file.check().keys), sum(1 for _ in file))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], env=environment(tmp_path), capture_output=True, check=False
    )
    assert done.stdout.split() == [b"150000", b"150000"], done.stderr.decode()


def test_temperature_zero_is_greedy_whatever_else_is_asked() -> None:
    assert not Parameters(temperature=0, top_p=0.5, top_k=4, do_sample=True).sampling(1).draws
    assert not Parameters().sampling(1).draws
    for asked in (Parameters(temperature=1), Parameters(temperature=0.7), Parameters(top_p=0.5), Parameters(min_p=0.1)):
        assert asked.sampling(1).draws
    penalized = Parameters(temperature=0, repetition_penalty=1.2).sampling(1)
    assert (penalized.repetition_penalty, penalized.draws) == (1.2, False)


def test_each_row_draws_from_its_own_stream() -> None:
    run = Parameters(seed=5)
    seeds = {seed_of(Parameters(), run, i) for i in (1, 2, "a", "b")}
    assert len(seeds) == 4
    assert seed_of(Parameters(), run, "a") in seeds
    assert seed_of(Parameters(seed=9), run, "a") == 9
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_stop_strings_are_bounded() -> None:
    assert Parameters(stop="x").stops() == ["x"]
    for stop in ("", ["a", ""], ["a"] * 65):
        with pytest.raises(InvalidRequest):
            Parameters(stop=stop).stops()
