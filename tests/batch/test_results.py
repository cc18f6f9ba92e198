"""Rows out: whole lines only, private, resumable, bound to their model, input and parameters."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from array import array
from pathlib import Path
from typing import Any

import pytest

from penstock.batch.parameters import Parameters
from penstock.batch.record import RunRecord, make_record, record_path
from penstock.batch.results import Result, ResultWriter
from penstock.batch.rows import Row, key_number
from penstock.errors import EnvironmentFault, UsageError
from tests.process import environment


def record(model: str = "m1", dtype: str = "float32", data: str = "d1", **parameters: Any) -> RunRecord:
    settings = {"dtype": dtype, "quantize": "none"}
    return make_record("demo", model, "p.txt", data, 9, Parameters(**parameters), settings)


def result(number: int, error: str | None = None, text: str = "täxt\n") -> Result:
    finish = "error" if error else "length"
    return Result(number, "p", text, [1, 2], finish, 3, 2, error, hash=row(number).identity())


def row(number: int) -> Row:
    return Row(id=number, prompt="p")


def done(writer: ResultWriter) -> set[int]:
    """Which of the rows 1 to 3 are there already, by their identities."""
    keys = array("Q", [key_number(row(i).identity()) for i in (1, 2, 3)])
    return {i for i, missing in zip((1, 2, 3), writer.missing(keys, list), strict=True) if not missing}


def open_writer(path: Path, now: RunRecord | None = None, **options: bool) -> ResultWriter:
    return ResultWriter(path, now or record(), **{"overwrite": False, "retry_errors": False, **options})


def fill(path: Path, *results: Result) -> None:
    writer = open_writer(path)
    writer.write(list(results))
    writer.close()


def ids(path: Path) -> list[int]:
    return [json.loads(line)["id"] for line in path.read_bytes().splitlines()]


def test_rows_and_record_are_private_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, result(1), result(2, "too long"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {
        "id": 1,
        "prompt": "p",
        "text": "täxt\n",
        "token_ids": [1, 2],
        "finish_reason": "length",
        "prompt_tokens": 3,
        "generated_tokens": 2,
        "hash": row(1).identity(),
    }
    assert lines[1]["error"] == "too long"
    for file in (path, record_path(path)):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert json.loads(record_path(path).read_text())["model_sha256"] == "m1"
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.jsonl.meta.json"]


def test_a_rerun_knows_what_is_done(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, result(1), result(2, "bad"))
    writer = open_writer(path)
    assert (done(writer), writer.done_before, writer.errors) == ({1, 2}, 2, 1)
    writer.write([result(3)])
    writer.close()
    assert ids(path) == [1, 2, 3]


def test_retry_errors_takes_the_failed_rows_out(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, result(1), result(2, "bad"), result(3))
    writer = open_writer(path, retry_errors=True)
    assert (done(writer), writer.errors) == ({1, 3}, 0)
    writer.write([result(2)])
    writer.close()
    assert ids(path) == [1, 3, 2]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_torn_tail_of_any_length_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, result(1), result(2))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        writer = open_writer(path)
        assert done(writer) == {1}
        writer.write([result(2)])
        writer.close()
        assert path.read_bytes() == whole
    path.write_bytes(whole + bytes(700))  # what some file systems leave after a power cut
    assert done(open_writer(path)) == {1, 2}


def test_damage_in_the_middle_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, result(1), result(2), result(3))
    damaged = path.read_bytes().replace(b'"id":2', b'"id":,', 1)
    path.write_bytes(damaged)
    with pytest.raises(EnvironmentFault, match="line 2 is not a row"):
        open_writer(path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (record(model="m2"), "the model"),
        (record(max_new_tokens=7), "max_new_tokens: None, now 7"),
        (record(dtype="bfloat16"), "dtype: 'float32', now 'bfloat16'"),
    ],
)
def test_another_run_is_refused(tmp_path: Path, now: RunRecord, words: str) -> None:
    path = tmp_path / "out.jsonl"
    fill(path, result(1))
    before = path.read_bytes()
    with pytest.raises(UsageError) as caught:
        open_writer(path, now)
    assert words in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert path.read_bytes() == before
    open_writer(path, now, overwrite=True).close()
    assert path.read_bytes() == b""
    assert open_writer(path, now).done_before == 0


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("my thesis\n")
    with pytest.raises(UsageError, match="not from `penstock generate`"):
        open_writer(path)
    assert path.read_text() == "my thesis\n"


def test_two_runs_cannot_share_an_output(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = open_writer(path)
    with pytest.raises(EnvironmentFault, match="Another run"):
        open_writer(path)
    first.close()
    open_writer(path).close()


def test_outputs_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="does not exist"):
        open_writer(tmp_path / "gone" / "out.jsonl")
    with pytest.raises(EnvironmentFault, match="Is a directory"):
        open_writer(tmp_path)


def test_a_full_disk_at_two_hundred_places(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow, at 200 sizes: the rows before stay, a rerun makes it complete."""
    script = """
import random, resource, signal, sys
from pathlib import Path
from penstock.errors import PartialResults
from array import array
from penstock.batch.rows import key_number
from tests.batch.test_results import fill, ids, open_writer, result, row
path, rng = Path(sys.argv[1]), random.Random(3)
stops = 0
for round in range(200):
    for file in path.parent.iterdir():
        file.unlink()
    todo = [result(i, text="é" * rng.randrange(60)) for i in range(9)]
    fill(path, todo.pop())
    size = path.stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + rng.randrange(1300), resource.RLIM_INFINITY))
    writer = open_writer(path)
    try:
        while todo:
            count = rng.randrange(1, 4)
            writer.write(todo[:count])
            del todo[:count]
        writer.close()
    except PartialResults as error:
        stops += 1
        said = int(error.why.split()[0])
        assert said == len(ids(path)), (error.why, path.read_bytes())
        assert "File too large" in error.what and error.exit_code == 6
        writer.close()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    writer = open_writer(path)
    keys = array("Q", [key_number(row(i).identity()) for i in range(9)])
    writer.write([result(i) for i, missing in enumerate(writer.missing(keys, list)) if missing])
    writer.close()
    assert sorted(ids(path)) == list(range(9))
print(stops)
"""
    env = environment(tmp_path)
    env["PYTHONPATH"] += os.pathsep + os.getcwd()
    (tmp_path / "full").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "full" / "out.jsonl")],
        env=env,
        capture_output=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert int(done.stdout) > 100
