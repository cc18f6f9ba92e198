"""`lm_gen MODEL INPUT OUTPUT NUM_TOKENS TEMPERATURE`, the drop-in."""

from __future__ import annotations

import json
import resource
import stat
import subprocess
from pathlib import Path

import pytest

from tests.process import check_error, command, environment, penstock

MODULE = "penstock.cli.lm_gen"


def lm_gen(*args: str | Path, home: Path) -> subprocess.CompletedProcess[bytes]:
    return penstock(*args, home=home, module=MODULE)


def test_prompts_with_their_continuations_in_order(tiny_llama: Path, tmp_path: Path) -> None:
    prompts = ["the quick", "lazy dog jumps over", "wizards"]
    (tmp_path / "in.txt").write_text("\n\n".join(prompts) + "\n")
    done = lm_gen(tiny_llama, tmp_path / "in.txt", tmp_path / "out", "12", "0", home=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert b"3 of 3 prompts" in done.stderr
    again = penstock(
        "generate", tiny_llama, "-i", tmp_path / "in.txt", "-o", "-", "--max-new-tokens", "12", home=tmp_path
    )
    texts = {row["prompt"]: row["text"] for row in map(json.loads, again.stdout.splitlines())}
    expected = "\n".join(f"{prompt}{texts[prompt]}\n" for prompt in prompts)
    assert (tmp_path / "out").read_bytes() == expected.encode()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o600


def test_temperature_draws_and_the_seed_repeats(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("the quick\n")
    runs = []
    for seed in ("1", "1", "2"):
        done = lm_gen(tiny_llama, tmp_path / "in.txt", "-", "12", "0.95", "--seed", seed, home=tmp_path)
        assert done.returncode == 0, done.stderr.decode()
        runs.append(done.stdout)
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["nosuch", "in.txt", "out", "5", "0"], 4, "no model 'nosuch'"),
        (["{model}", "gone.txt", "out", "5", "0"], 3, "does not exist"),
        (["{model}", "bad.txt", "out", "5", "0"], 2, "line 1"),
        (["{model}", "in.txt", "gone/out", "5", "0"], 3, "cannot be opened"),
        (["{model}", "in.txt", "/dev/full", "5", "0"], 6, "No space left"),
        (["{model}", "in.txt", "out", "5000", "0"], 6, "1 of 1 prompts could not be continued"),
    ],
)
def test_mistakes(tiny_llama: Path, tmp_path: Path, args: list[str], code: int, words: str) -> None:
    (tmp_path / "in.txt").write_text("the quick\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\n")
    filled = [str(tiny_llama) if a == "{model}" else a for a in args]
    done = penstock(*filled, home=tmp_path, module=MODULE, cwd=tmp_path)
    check_error(done, code, words)


@pytest.mark.parametrize(("tokens", "temperature"), [("0", "0"), ("x", "0"), ("5", "nan"), ("5", "-1")])
def test_numbers_that_are_none(tmp_path: Path, tokens: str, temperature: str) -> None:
    done = lm_gen("demo", "in", "out", tokens, temperature, home=tmp_path)
    assert done.returncode == 2
    assert b"Error: " in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_full_disk(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("the quick\n" * 40)
    done = subprocess.run(
        command(tiny_llama, tmp_path / "in.txt", tmp_path / "out", "20", "0", module=MODULE),
        env=environment(tmp_path),
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY)),
        check=False,
    )
    check_error(done, 6, "File too large", "prompts are done and stay")
