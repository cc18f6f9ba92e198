"""`penstock generate` as users run it: real processes, real signals, real full disks."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.process import check_error, command, environment, penstock

FAST = ("--max-batch-size", "8", "--max-batch-total-tokens", "4096", "--threads", "1")
Row = dict[str, Any]


def write_rows(path: Path, *rows: Row) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[Row]:
    text = path.read_bytes()
    assert text == b"" or text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def test_greedy_rows_equal_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("the quick brown fox\n\nseven wizards make\n")
    done = penstock(
        "generate", tiny_llama, "-i", "p.txt", "-o", "o.jsonl", "--max-new-tokens", "40", "--ignore-eos",
        "--dtype", "float32", "--json", home=tmp_path, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = read_rows(tmp_path / "o.jsonl")
    assert sorted(row["id"] for row in rows) == [1, 3]
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        with torch.inference_mode():
            truth = model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        assert row["prompt_tokens"] == ids.shape[1]
        assert row["token_ids"] == truth.tolist()
        assert row["text"] == tokenizer.decode(truth, skip_special_tokens=True)
        assert (row["finish_reason"], row["generated_tokens"]) == ("length", 40)
    summary = json.loads(done.stdout)
    assert (summary["rows"], summary["done"], summary["tokens"], summary["errors"]) == (2, 2, 80, 0)
    assert summary["generate_seconds"] > 0
    assert stat.S_IMODE((tmp_path / "o.jsonl").stat().st_mode) == 0o600
    assert b"2 of 2 rows done" in done.stderr


def test_rows_with_parameters_of_their_own(tiny_llama: Path, tmp_path: Path) -> None:
    """Parameters, stop strings, seeds, token ids, and rows that cannot run beside rows that can."""
    path = write_rows(
        tmp_path / "r.jsonl",
        {"id": "greedy", "prompt": "the lazy dog", "max_new_tokens": 24},
        {"id": "seed1", "prompt": "the lazy dog", "temperature": 1.5, "seed": 1},
        {"id": "seed1again", "prompt": "the lazy dog", "temperature": 1.5, "seed": 1},
        {"id": "free1", "prompt": "the lazy dog", "temperature": 1.5},
        {"id": "free2", "prompt": "the lazy dog", "temperature": 1.5},
        {"id": "ids", "prompt_token_ids": [0, 17, 300], "max_new_tokens": 3},
        {"id": "long", "prompt_token_ids": [5] * 600},
        {"id": "outside", "prompt_token_ids": [512]},
        {"id": "negative", "prompt": "x", "temperature": -1},
        {"id": "nothing", "prompt": ""},
        {"id": "zero", "prompt": "x", "max_new_tokens": 0},
        {"id": "seed", "prompt": "x", "temperature": 1, "seed": 2**64},
    )
    args = ("generate", tiny_llama, "-i", path, "-o", tmp_path / "o.jsonl", "--max-new-tokens", "12", *FAST)
    done = penstock(*args, home=tmp_path)
    check_error(done, 6, "6 of 12 rows ended in an error", "--retry-errors")
    rows = {row["id"]: row for row in read_rows(tmp_path / "o.jsonl")}
    assert len(rows) == 12
    assert rows["greedy"]["generated_tokens"] == 24
    assert rows["seed1"]["token_ids"] == rows["seed1again"]["token_ids"] != rows["greedy"]["token_ids"][:12]
    assert rows["free1"]["token_ids"] != rows["free2"]["token_ids"]
    assert (rows["ids"]["prompt"], rows["ids"]["prompt_tokens"], rows["ids"]["generated_tokens"]) == (None, 3, 3)
    words = {
        "long": "tokens",
        "outside": "token id 512",
        "negative": "`temperature`",
        "nothing": "empty",
        "zero": "`max_new_tokens`",
        "seed": "`seed`",
    }
    for name, word in words.items():
        assert rows[name]["finish_reason"] == "error"
        assert word in rows[name]["error"]

    text = rows["greedy"]["text"]
    stop = text[8:11]
    path = write_rows(tmp_path / "s.jsonl", {"prompt": "the lazy dog", "stop": stop})
    args = ("generate", tiny_llama, "-i", path, "-o", "-", "--max-new-tokens", "24", *FAST)
    done = penstock(*args, home=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    row = json.loads(done.stdout)
    assert row["finish_reason"] == "stop_sequence"
    assert row["text"] == text[: text.index(stop) + len(stop)]


def test_retry_errors_and_another_runs_output(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", {"prompt": "a"}, {"prompt": "b", "max_new_tokens": 4000})
    args = ["generate", tiny_llama, "-i", path, "-o", tmp_path / "o.jsonl", "--max-new-tokens", "3", *FAST]
    first = penstock(*args, home=tmp_path)
    again = penstock(*args, home=tmp_path)
    retried = penstock(*args, "--retry-errors", home=tmp_path)
    for done, earlier in ((first, b""), (again, b"2 of them by earlier runs"), (retried, b"1 of them by")):
        check_error(done, 6, "1 of 2 rows ended in an error")
        assert earlier in done.stderr
    assert b"load 0.0 s" in again.stderr  # nothing to do: the model was not loaded
    assert sorted(row["id"] for row in read_rows(tmp_path / "o.jsonl")) == [1, 2]
    other = penstock(*args[:-1], "2", home=tmp_path)  # threads do not change the text
    check_error(other, 6, "1 of 2 rows ended in an error")
    check_error(penstock(*args, "--temperature", "1", home=tmp_path), 2, "another run", "temperature: None, now 1.0")


def test_a_model_without_tokenizer_takes_token_ids(tiny_llama: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(tiny_llama / name, bare / name)
    ids = write_rows(tmp_path / "ids.jsonl", {"prompt_token_ids": [0, 5, 9]}, {"prompt_token_ids": [7], "stop": "x"})
    done = penstock("generate", bare, "-i", ids, "-o", "-", "--max-new-tokens", "4", *FAST, home=tmp_path)
    check_error(done, 6, "1 of 2 rows")
    rows = {row["id"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert (rows[1]["text"], rows[1]["generated_tokens"]) == (None, 4)
    assert "no tokenizer" in rows[2]["error"]
    text = write_rows(tmp_path / "text.jsonl", {"prompt_token_ids": [0]}, {"prompt": "hello"})
    done = penstock("generate", bare, "-i", text, "-o", tmp_path / "o", home=tmp_path)
    check_error(done, 4, "no tokenizer", "line 2", "prompt_token_ids")
    assert not (tmp_path / "o").exists()


def long_run(tiny_llama: Path, folder: Path, rows: int = 300) -> list[str]:
    """The arguments of a run that takes some seconds; each row's text is its own."""
    rng = random.Random(5)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "seven", "wizards", "toxic"]
    path = write_rows(
        folder / "long.jsonl",
        *({"id": f"r{i}", "prompt": " ".join(rng.choices(words, k=rng.randrange(2, 12)))} for i in range(rows)),
    )
    return ["generate", str(tiny_llama), "-i", str(path), "--max-new-tokens", "48", "--ignore-eos", *FAST]


@pytest.fixture(scope="module")
def truth(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """What an undisturbed run of `long_run` makes."""
    folder = tmp_path_factory.mktemp("truth")
    done = penstock(*long_run(tiny_llama, folder), "-o", folder / "o.jsonl", home=folder)
    assert done.returncode == 0, done.stderr.decode()
    rows = read_rows(folder / "o.jsonl")
    assert len(rows) == 300
    return {row["id"]: row for row in rows}


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < until:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)


def test_kill_nine_loses_doubles_and_tears_nothing(tiny_llama: Path, tmp_path: Path, truth: dict[str, Row]) -> None:
    """Killed again and again at random moments; each time the same command goes on. At the end every row is there
    exactly once, with the tokens of the undisturbed run."""
    args = [*long_run(tiny_llama, tmp_path), "-o", str(tmp_path / "o.jsonl")]
    output, rng, kills, before = tmp_path / "o.jsonl", random.Random(11), 0, 0
    for _ in range(12):
        process = subprocess.Popen(command(*args), env=environment(tmp_path), stderr=subprocess.PIPE)
        wait_for_rows(output, before + rng.randrange(1, 90), process)
        time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        before = output.read_bytes().count(b"\n")
        if process.returncode == 0:
            break
    else:
        done = penstock(*args, home=tmp_path)
        assert done.returncode == 0, done.stderr.decode()
    assert kills >= 4
    rows = read_rows(output)
    assert len(rows) == len(truth)
    assert {row["id"]: row for row in rows} == truth


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_done(
    tiny_llama: Path, tmp_path: Path, truth: dict[str, Row], number: signal.Signals
) -> None:
    args = [*long_run(tiny_llama, tmp_path), "-o", str(tmp_path / "o.jsonl")]
    output = tmp_path / "o.jsonl"
    process = subprocess.Popen(command(*args), env=environment(tmp_path), stderr=subprocess.PIPE)
    wait_for_rows(output, 10, process)
    since = time.monotonic()
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert time.monotonic() - since < 3
    assert process.returncode == 130
    assert b"the same command continues" in stderr
    assert b"Traceback" not in stderr
    rows = read_rows(output)
    assert 10 <= len(rows) < 300
    assert all(row == truth[row["id"]] for row in rows)


def test_ctrl_c_while_the_model_loads(tiny_llama: Path, tmp_path: Path) -> None:
    args = [*long_run(tiny_llama, tmp_path, rows=5000), "-o", str(tmp_path / "o.jsonl")]
    for seconds in (0.0, 0.15, 0.3, 0.6):
        (tmp_path / "o.jsonl").unlink(missing_ok=True)
        process = subprocess.Popen(command(*args), env=environment(tmp_path), stderr=subprocess.PIPE)
        wait_for_rows(tmp_path / "o.jsonl", 0, process)  # the output is open, so the loading has begun
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=3)
        assert process.returncode == 130
        assert b"interrupted" in stderr
        assert b"Traceback" not in stderr


def test_a_full_disk_keeps_what_is_done(tiny_llama: Path, tmp_path: Path, truth: dict[str, Row]) -> None:
    """The kernel stops the file's growth at 40 kB; with room again the same command completes it."""
    args = [*long_run(tiny_llama, tmp_path), "-o", str(tmp_path / "o.jsonl")]
    done = subprocess.run(
        command(*args),
        env=environment(tmp_path),
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY)),
        check=False,
        timeout=60,
    )
    rows = read_rows(tmp_path / "o.jsonl")
    assert 0 < len(rows) < 300
    check_error(done, 6, "File too large", f"{len(rows)} of 300 rows are done and stay", "same command")
    again = penstock(*args, home=tmp_path)
    assert again.returncode == 0, again.stderr.decode()
    rows = read_rows(tmp_path / "o.jsonl")
    assert len(rows) == 300
    assert {row["id"]: row for row in rows} == truth


def test_a_full_file_system(tiny_llama: Path, tmp_path: Path, truth: dict[str, Row]) -> None:
    """A real one of 64 kB; when it grows, the same command completes the output."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a file system")
    try:
        args = [*long_run(tiny_llama, tmp_path), "-o", str(disk / "o.jsonl")]
        done = penstock(*args, home=tmp_path)
        rows = read_rows(disk / "o.jsonl")
        assert 0 < len(rows) < 300
        check_error(done, 6, "No space left on device", f"{len(rows)} of 300 rows are done and stay")
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        again = penstock(*args, home=tmp_path)
        assert again.returncode == 0, again.stderr.decode()
        assert {row["id"]: row for row in read_rows(disk / "o.jsonl")} == truth
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_device_without_space(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    done = penstock("generate", tiny_llama, "-i", tmp_path / "p.txt", "-o", "/dev/full", *FAST, home=tmp_path)
    check_error(done, 6, "No space left on device", "0 of 2 rows")


def test_stdin_to_stdout_and_a_reader_that_leaves(tiny_llama: Path, tmp_path: Path) -> None:
    args = ("generate", tiny_llama, "-i", "-", "-o", "-", "--max-new-tokens", "2", *FAST)
    done = penstock(*args, home=tmp_path, stdin=b'{"prompt": "one"}\n{"prompt": "two", "id": "b"}\n')
    assert done.returncode == 0, done.stderr.decode()
    assert {json.loads(line)["id"] for line in done.stdout.splitlines()} == {1, "b"}
    process = subprocess.Popen(
        command(*args), env=environment(tmp_path), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(b"one\ntwo\n", timeout=60)
    assert process.returncode == 1
    assert b"Traceback" not in stderr
    assert b"Error" not in stderr


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("bad.jsonl", b'{"prompt": "x"}\n{"prompt": }\n', 2, ["bad.jsonl, line 2", "malformed"]),
        ("bad.txt", b"fine\nbad \xff byte\n", 2, ["bad.txt, line 2", "not UTF-8"]),
        ("gone.txt", None, 3, ["gone.txt", "does not exist"]),
        ("empty.txt", b"\n", 2, ["holds no prompts"]),
    ],
)
def test_bad_inputs_fail_before_the_model_is_loaded(
    tiny_llama: Path, tmp_path: Path, name: str, content: bytes | None, code: int, words: list[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    since = time.monotonic()
    done = penstock("generate", tiny_llama, "-i", tmp_path / name, "-o", tmp_path / "o", home=tmp_path)
    assert time.monotonic() - since < 3
    check_error(done, code, *words)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("verb", ["generate", "embed", "lm_gen"])
def test_an_output_that_is_the_input_is_refused(tmp_path: Path, verb: str) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("one\ntwo\n")
    other = tmp_path / "link.txt"
    other.symlink_to(prompts)
    if verb == "lm_gen":
        done = subprocess.run(
            [sys.executable, "-m", "penstock.cli.lm_gen", "demo", prompts, other, "3", "0"],
            env=environment(tmp_path), capture_output=True, timeout=120, check=False,
        )  # fmt: skip
    else:
        done = penstock(verb, "demo", "-i", prompts, "-o", other, "--overwrite", home=tmp_path)
    check_error(done, 2, "is the input")
    assert prompts.read_text() == "one\ntwo\n"


def test_weights_that_are_not_numbers(tiny_llama: Path, tmp_path: Path) -> None:
    """Rows that the engine cannot compute end in an error each; no traceback, and nothing hangs."""
    bad = tmp_path / "nan"
    bad.mkdir()
    for file in tiny_llama.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    weights = load_file(bad / "model.safetensors")
    weights["model.embed_tokens.weight"][2:] = np.nan  # all but the first tokens, one of which the engine tries itself
    save_file(weights, bad / "model.safetensors")
    (tmp_path / "p.txt").write_text("hello\nfox\n")
    done = penstock("generate", bad, "-i", tmp_path / "p.txt", "-o", tmp_path / "o.jsonl", *FAST, home=tmp_path)
    check_error(done, 6, "2 of 2 rows ended in an error")
    assert all("not numbers" in row["error"] for row in read_rows(tmp_path / "o.jsonl"))


def test_bad_models(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("hello\n")
    (tmp_path / "nomodel").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_llama.iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 5000 if file.suffix == ".safetensors" else None])

    def run(model: Path | str) -> subprocess.CompletedProcess[bytes]:
        return penstock("generate", model, "-i", tmp_path / "p.txt", "-o", "-", home=tmp_path)

    check_error(run("nosuchmodel"), 4, "no model 'nosuchmodel'")
    check_error(run(tmp_path / "nomodel"), 4, "no config.json", "empty")
    check_error(run(broken), 4, "model.safetensors", "cut short")


def test_rows_that_must_match_a_grammar(tmp_path: Path) -> None:
    """A schema for the run, a grammar of its own for a row, and one that cannot be followed."""
    source, output, schema = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}')
    rows = [
        {"id": "run", "prompt": "Once", "max_new_tokens": 40},
        {"id": "own", "prompt": "Once", "grammar": {"kind": "regex", "value": "[a-c]{3}"}},
        {"id": "bad", "prompt": "Once", "grammar": {"kind": "json_schema", "value": {"not": {}}}},
    ]
    source.write_text("\n".join(json.dumps(row) for row in rows))
    arguments = ["generate", "demo", "-i", str(source), "-o", str(output), "--json-schema", str(schema)]
    done = penstock(*arguments, home=tmp_path)
    assert done.returncode == 6, done.stderr.decode()
    results = {row["id"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert set(json.loads(results["run"]["text"])) == {"n"}
    assert re.fullmatch("[a-c]{3}", results["own"]["text"])
    assert "`not` at /not" in results["bad"]["error"]
    schema.write_text('{"not": {}}')
    done = penstock(*arguments, home=tmp_path)
    check_error(done, 2, "`not` at /not")


def test_tables_templates_samples_and_choices(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "w.csv").write_text("id,word,lang\nk1,cat,French\nk2,dog,German\n")
    done = penstock(
        "generate", tiny_llama, "-i", "w.csv", "-o", "o.jsonl", "--template", "{word} in {lang}:", "--choice", "yes",
        "--choice", "no", "-n", "3", "--temperature", "1.5", *FAST, home=tmp_path, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    rows = {row["id"]: row for row in read_rows(tmp_path / "o.jsonl")}
    assert {name: row["prompt"] for name, row in rows.items()} == {"k1": "cat in French:", "k2": "dog in German:"}
    for row in rows.values():
        assert {sample["text"] for sample in row["samples"]} <= {"yes", "no"}
        assert len(row["samples"]) == 3
        assert row["text"] == row["samples"][0]["text"]
    again = penstock(
        "generate", tiny_llama, "-i", "w.csv", "-o", "o.jsonl", "--template", "{word}:", "--choice", "yes",
        "--choice", "no", "-n", "3", "--temperature", "1.5", *FAST, home=tmp_path, cwd=tmp_path,
    )  # fmt: skip
    check_error(again, 2, "another run", "template: '{word} in {lang}:', now '{word}:'")
    for wrong, words in ((["--regex", "a", "--json-object"], "contradict"), (["--regex", "("], "--regex")):
        bad = penstock("generate", tiny_llama, "-i", "w.csv", "-o", "x", *wrong, home=tmp_path, cwd=tmp_path)
        check_error(bad, 2, words)


def test_conversations_and_chat(tiny_llama: Path, tmp_path: Path) -> None:
    """The three ways to say the same thing come to the same prompt."""
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    path = write_rows(
        tmp_path / "c.jsonl",
        {"id": "messages", "messages": messages},
        {"id": "system", "messages": messages[1:], "system": "be kind"},
        {"id": "chat", "prompt": "hello", "chat": True, "system": "be kind"},
        {"id": "none", "messages": []},
        {"id": "roleless", "messages": [{"content": "x"}]},
    )
    done = penstock("generate", tiny_llama, "-i", path, "-o", "-", "--max-new-tokens", "4", *FAST, home=tmp_path)
    check_error(done, 6, "2 of 5 rows")
    rows = {row["id"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows["messages"]["prompt"] == rows["system"]["prompt"] == rows["chat"]["prompt"] != "hello"
    assert rows["messages"]["token_ids"] == rows["chat"]["token_ids"]
    assert "cannot be empty" in rows["none"]["error"]
    assert "`role`" in rows["roleless"]["error"]


def test_the_input_may_grow_but_not_change(tiny_llama: Path, tmp_path: Path) -> None:
    first = [{"id": "a", "prompt": "one"}, {"id": "b", "prompt": "two"}]
    args = ["generate", tiny_llama, "-o", tmp_path / "o.jsonl", "--max-new-tokens", "2", *FAST, "-i"]

    def run(name: str, *rows: Row) -> subprocess.CompletedProcess[bytes]:
        return penstock(*args, write_rows(tmp_path / name, *rows), home=tmp_path)

    assert run("1.jsonl", *first).returncode == 0
    before = (tmp_path / "o.jsonl").read_bytes()
    check_error(run("2.jsonl", first[0], {"id": "b", "prompt": "TWO"}), 2, "row 'b' (line 2) asks for something else")
    check_error(run("3.jsonl", first[0], {**first[1], "seed": 3}), 2, "row 'b' (line 2)")
    check_error(run("4.jsonl", first[1]), 2, "row 'a' is gone")
    check_error(run("5.jsonl", {"id": "c", "prompt": "x"}), 2, "and 1 more rows differ")
    assert (tmp_path / "o.jsonl").read_bytes() == before
    grown = run("6.jsonl", {"id": "new", "prompt": "three"}, first[1], first[0])
    assert grown.returncode == 0, grown.stderr.decode()
    assert b"2 of them by earlier runs" in grown.stderr
    assert [row["id"] for row in read_rows(tmp_path / "o.jsonl")][2:] == ["new"]


def test_what_prompts_share_is_computed_once(tiny_llama: Path) -> None:
    """Counted by the engine: the shared tokens of all prompts but the first come out of the cache, in any order."""
    from penstock.batch.local import generate_rows
    from penstock.batch.parameters import Parameters
    from penstock.batch.prompts import Prompter
    from penstock.batch.rows import Row as BatchRow
    from penstock.engine.config import EngineConfig
    from penstock.engine.loop import EngineLoop

    rng = random.Random(4)
    shared = [[rng.randrange(3, 500) for _ in range(160)] for _ in range(3)]
    prompts = [shared[n % 3] + [rng.randrange(3, 500) for _ in range(9)] for n in range(90)]
    rows = [BatchRow(id=n, prompt_token_ids=ids) for n, ids in enumerate(prompts)]
    run = Parameters(max_new_tokens=3, ignore_eos=True)
    found = {}
    for caching in (True, False):
        config = EngineConfig(
            model_path=str(tiny_llama), dtype="float32", max_batch_size=16, max_batch_total_tokens=8192,
            prefix_caching=caching,
        )  # fmt: skip
        engine = EngineLoop.load(config)
        steps = list(generate_rows(engine, Prompter(None), rows, run))
        results = {result.id: result.token_ids for step in steps for result in step.results}
        found[caching] = results, engine.stats.cached_prompt_tokens
        assert engine.current_stats().used_blocks == 0
    assert found[True][0] == found[False][0]
    assert found[False][1] == 0
    assert found[True][1] == 87 * 160


def test_leaving_early_leaves_an_engine_that_can_be_used(tiny_llama: Path) -> None:
    from penstock.batch.local import generate_rows
    from penstock.batch.parameters import Parameters
    from penstock.batch.prompts import Prompter
    from penstock.batch.rows import Row as BatchRow
    from penstock.engine.config import EngineConfig
    from penstock.engine.loop import EngineLoop

    engine = EngineLoop.load(EngineConfig(model_path=str(tiny_llama), max_batch_size=4, max_batch_total_tokens=4096))
    rows = [BatchRow(id=n, prompt_token_ids=[5, n + 3], n=2, temperature=1.0) for n in range(50)]
    steps = generate_rows(engine, Prompter(None), iter(rows), Parameters(max_new_tokens=50, ignore_eos=True))
    next(steps)
    assert engine.has_work
    steps.close()
    assert not engine.has_work
    assert engine.current_stats().used_blocks == 0


def openai_line(name: str, url: str = "/v1/chat/completions", **body: Any) -> Row:
    body = body or {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def test_a_batch_file_of_openai(tiny_llama: Path, tmp_path: Path) -> None:
    """Answered by the server's routes, without a server; a rerun does what is missing."""
    lines = [openai_line(f"r{n}") for n in range(20)]
    lines += [
        openai_line("text", "/v1/completions", prompt="fox", max_tokens=2, logprobs=1),
        openai_line("vector", "/v1/embeddings", input="fox"),
        openai_line("bad", messages=[]),
    ]
    path = write_rows(tmp_path / "in.jsonl", *lines)
    args = ["generate", tiny_llama, "-i", path, "-o", tmp_path / "o.jsonl", *FAST]
    done = penstock(*args, "--json", home=tmp_path)
    check_error(done, 6, "1 of 23 rows ended in an error")
    assert json.loads(done.stdout)["tokens"] == 62
    rows = {row["custom_id"]: row for row in read_rows(tmp_path / "o.jsonl")}
    assert len(rows) == 23
    assert {row["response"]["status_code"] for row in rows.values()} == {200, 422}
    assert rows["r3"]["response"]["body"]["choices"][0]["finish_reason"] == "length"
    assert rows["text"]["response"]["body"]["choices"][0]["logprobs"]["tokens"]
    assert rows["vector"]["response"]["body"]["data"][0]["embedding"]
    whole = (tmp_path / "o.jsonl").read_bytes()
    (tmp_path / "o.jsonl").write_bytes(whole[: whole.index(b"\n", 3000) + 40])
    again = penstock(*args, home=tmp_path)
    check_error(again, 6, "1 of 23 rows")
    rows_again = {row["custom_id"]: row for row in read_rows(tmp_path / "o.jsonl")}
    assert rows_again.keys() == rows.keys()
    check_error(penstock(*args, "--temperature", "1", home=tmp_path), 2, "--temperature has no effect")
    process = subprocess.Popen(
        command(*[*args[:-len(FAST)][:-1], tmp_path / "stopped.jsonl", *FAST]), env=environment(tmp_path),
        stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for_rows(tmp_path / "stopped.jsonl", 1, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert (process.returncode, b"Traceback" in stderr) in ((130, False), (6, False)), stderr.decode()
    write_rows(path, *lines[:-1], openai_line("bad"))
    check_error(penstock(*args, home=tmp_path), 2, "row 'bad' (line 23) asks for something else")
    write_rows(path, *lines, openai_line("r1"))
    check_error(penstock(*args, home=tmp_path), 2, "line 24", "r1", "there before")
