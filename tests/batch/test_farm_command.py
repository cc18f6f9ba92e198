"""`penstock farm` as users run it on one machine: the demo model's cousin, real processes, real signals."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.process import check_error, command, environment, penstock

FAST = ("--max-batch-size", "8", "--max-batch-total-tokens", "4096", "--threads", "1")
QUICK = ("--lease", "3", "--commit", "0.2", "--shard-rows", "16")


def write_prompts(file: Path, count: int) -> Path:
    rng = random.Random(2)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "seven", "wizards", "make", "toxic"]
    file.write_text("".join(" ".join(rng.choices(words, k=rng.randrange(2, 12))) + "\n" for _ in range(count)))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_bytes().splitlines()]


@pytest.fixture(scope="module")
def done(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a user whose farm `farm` of 60 prompts is done, beside what `generate` makes of them."""
    home = tmp_path_factory.mktemp("home")
    prompts = write_prompts(home / "p.txt", 60)
    args = ("--max-new-tokens", "8", "--ignore-eos", *FAST)
    one = penstock("generate", tiny_llama, "-i", prompts, "-o", home / "reference.jsonl", *args, home=home)
    assert one.returncode == 0, one.stderr.decode()
    run = penstock(
        "farm", "run", "-i", prompts, "-m", tiny_llama, "-o", home / "farm", "--workers", "2", "--stats", "--json",
        *args, *QUICK, home=home,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr.decode()
    status = json.loads(run.stdout)
    assert (status["complete"], status["done"], status["tokens"]) == (True, 60, 480)
    return home


def farm(home: Path, verb: str, *args: str | Path) -> subprocess.CompletedProcess[bytes]:
    return penstock("farm", verb, home / "farm", *args, home=home)


def test_the_answers_are_those_of_generate_in_the_order_of_the_prompts(done: Path) -> None:
    rows = read(done / "farm" / "output.jsonl")
    assert [row["id"] for row in rows] == list(range(1, 61))
    assert rows == sorted(read(done / "reference.jsonl"), key=lambda row: row["id"])
    checked = farm(done, "merge", "--check", "--json")
    assert checked.returncode == 0, checked.stderr.decode()
    found = json.loads(checked.stdout)
    assert found["sound"]
    assert found["complete"]
    assert (found["rows"], found["answered"], found["output"]["rows"]) == (60, 60, 60)


def test_a_merge_destroys_nothing_that_the_farm_is_made_of(done: Path) -> None:
    (rows,) = (done / "farm").glob("rows-*.jsonl")
    (done / "link.jsonl").symlink_to(done / "p.txt")
    for file in (done / "p.txt", rows, done / "farm" / "farm.json", done / "link.jsonl"):
        before = file.read_bytes()
        check_error(farm(done, "merge", "-o", file), 2, "is the input")
        assert file.read_bytes() == before
    assert farm(done, "merge", "-o", done / "other.jsonl").returncode == 0
    assert (done / "other.jsonl").read_bytes() == (done / "farm" / "output.jsonl").read_bytes()


def test_status_and_report(done: Path) -> None:
    status = json.loads(farm(done, "status", "--json").stdout)
    assert status["partitions"][0]["rows"] == 60
    assert status["seconds_left"] == 0
    text = farm(done, "status", "--watch").stdout.decode()  # it ends by itself: the farm is complete
    assert "60 of 60 rows done; complete" in text
    report = farm(done, "report", "--json")
    assert report.returncode == 0, report.stderr.decode()
    stats = json.loads(report.stdout)
    assert (stats["tokens"], stats["total"]["rows"]) == (480, 60)
    assert stats["node_hours_per_million"] > 0
    assert stats["lost"]["loading"] > 0
    assert stats == json.loads((done / "farm" / "stats.json").read_text())
    page = (done / "farm" / "report.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href)=", page)  # nothing to fetch
    tokens = re.findall(r"<title>[^<]*?(\d+) rows, (\d+) tokens, finished</title>", page)
    assert sum(int(count) for _, count in set(tokens)) >= 240


def test_the_same_command_adds_nothing_and_another_is_refused(done: Path, tiny_llama: Path) -> None:
    args = ["farm", "run", "-i", done / "p.txt", "-m", tiny_llama, "-o", done / "farm", *FAST, *QUICK]
    same = penstock(*args, "--max-new-tokens", "8", "--ignore-eos", home=done)
    assert same.returncode == 0, same.stderr.decode()
    changed = penstock(*args, "--max-new-tokens", "9", "--ignore-eos", home=done)
    check_error(changed, 2, "another farm", "max_new_tokens: 8, now 9")
    model = penstock(*args[:5], "demo", *args[6:], "--max-new-tokens", "8", "--ignore-eos", home=done)
    check_error(model, 2, "the model", "now demo")
    other = write_prompts(done / "q.txt", 61)
    prompts = penstock(*args[:3], other, *args[4:], "--max-new-tokens", "8", "--ignore-eos", home=done)
    check_error(prompts, 2, "the prompts", "now", "61")


def test_resume_refuses_what_changed(tiny_llama: Path, tmp_path: Path) -> None:
    """A farm that is not complete; its file of prompts, then its model, is not what it was."""
    import shutil

    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    prompts = write_prompts(tmp_path / "p.txt", 5)
    text = prompts.read_text()
    started = subprocess.Popen(
        command("farm", "run", "-i", prompts, "-m", model, "-o", tmp_path / "farm", *FAST, *QUICK),
        env=environment(tmp_path),
        stderr=subprocess.DEVNULL,
    )
    while not (tmp_path / "farm" / "farm.json").exists():
        time.sleep(0.01)
    started.kill()
    started.wait()
    prompts.write_text(text + "one more\n")
    check_error(farm(tmp_path, "resume"), 2, "prompts", "have changed", "5 rows", "6")
    prompts.write_text(text)
    config = model / "config.json"
    config.write_text(config.read_text() + " ")
    check_error(farm(tmp_path, "resume"), 2, "model", "has changed")
    config.write_text(config.read_text()[:-1])
    resumed = farm(tmp_path, "resume")
    assert resumed.returncode == 0, resumed.stderr.decode()
    assert len(read(tmp_path / "farm" / "output.jsonl")) == 5


def test_interrupted_cancelled_resumed(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "p.txt", 3000)
    args = ("--max-new-tokens", "24", "--ignore-eos", *FAST, *QUICK, "--grace", "0")
    line = ("farm", "run", "-i", prompts, "-m", tiny_llama, "-o", tmp_path / "farm", *args)
    process = subprocess.Popen(command(*line), env=environment(tmp_path), stderr=subprocess.PIPE)
    wait_for_rows(tmp_path / "farm", 20)
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr.decode()
    assert b"resume" in stderr
    assert b"Traceback" not in stderr
    assert time.monotonic() - since < 10
    check_error(farm(tmp_path, "merge"), 6, "not answered yet", "resume")
    before = rows_in(tmp_path / "farm")
    process = subprocess.Popen(command("farm", "resume", tmp_path / "farm"), env=environment(tmp_path))
    wait_for_rows(tmp_path / "farm", before + 20)
    assert farm(tmp_path, "cancel").returncode == 0
    assert process.wait(30) != 0
    check_error(penstock(*line, home=tmp_path), 2, "was cancelled", "resume")
    status = json.loads(farm(tmp_path, "status", "--json").stdout)
    assert status["cancelled"]
    assert before < status["done"] < 3000
    assert farm(tmp_path, "resume").returncode == 0
    assert [row["id"] for row in read(tmp_path / "farm" / "output.jsonl")] == list(range(1, 3001))
    assert json.loads(farm(tmp_path, "merge", "--check", "--json").stdout)["repeated"] == 0


def rows_in(folder: Path) -> int:
    return sum(file.read_bytes().count(b'"event":"row"') for file in folder.glob("spool/*.jsonl"))


def wait_for_rows(folder: Path, count: int) -> None:
    until = time.monotonic() + 60
    while rows_in(folder) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_rows_that_end_in_an_error_are_partial_results(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": "fox"}, {"id": "b", "prompt": "dog", "max_new_tokens": 100000}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ("farm", "run", "-i", tmp_path / "r.jsonl", "-m", tiny_llama, "-o", tmp_path / "farm", *FAST)
    check_error(penstock(*line, "--max-new-tokens", "2", home=tmp_path), 6, "1 of 2 rows ended in an error")
    answers = read(tmp_path / "farm" / "output.jsonl")
    assert [("error" in answer, answer["id"]) for answer in answers] == [(False, "a"), (True, "b")]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("status", "nowhere"), 2, ["holds no farm", "--output"]),
        (("run", "-i", "gone.txt", "-m", "demo", "-o", "f"), 3, ["does not exist"]),
        (("run", "-i", "p.txt", "-m", "demo", "-o", "f", "--profile", "gpu"), 2, ["--profile", "quantize"]),
        (("run", "-i", "p.txt", "-m", "demo", "-o", "f", "--profile", "gpu:speed=9"), 2, ["speed"]),
        (("run", "-i", "p.txt", "-m", "no/such-model", "-o", "f", "--offline"), 4, ["no/such-model"]),
    ],
)
def test_mistakes(tmp_path: Path, args: tuple[str, ...], code: int, words: list[str]) -> None:
    write_prompts(tmp_path / "p.txt", 2)
    found = penstock("farm", *args, home=tmp_path, cwd=tmp_path)
    if "no/such-model" in args:
        assert found.returncode in (3, 4)
    else:
        check_error(found, code, *words)
    assert not (tmp_path / "f" / "farm.json").exists()
