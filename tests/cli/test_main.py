"""The command itself: quick, lazy, helpful, and every failure with its exit code."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from penstock import __version__
from penstock.cli.main import COMMANDS
from tests.process import check_error, command, environment, penstock


def test_help_takes_at_most_150_milliseconds(tmp_path: Path) -> None:
    seconds = []
    for _ in range(5):
        since = time.perf_counter()
        done = penstock("--help", home=tmp_path)
        seconds.append(time.perf_counter() - since)
        assert done.returncode == 0
        assert all(name in done.stdout.decode() for name in COMMANDS)
    assert min(seconds) <= 0.150, seconds


def test_importing_the_command_imports_only_click_and_the_standard_library(tmp_path: Path) -> None:
    script = (
        "import sys; before = set(sys.modules); import penstock.cli.main\n"
        "new = {n.split('.')[0] for n in set(sys.modules) - before}\n"
        "print(*sorted(n for n in new if n not in sys.stdlib_module_names))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path), capture_output=True, check=True, text=True
    )
    assert done.stdout.split() == ["click", "penstock"]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_and_loads_nothing_heavy_for_it(tmp_path: Path, name: str) -> None:
    done = penstock(name, "--help", home=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert COMMANDS[name][1].split(",")[0][:20] in penstock("--help", home=tmp_path).stdout.decode()
    assert b"--debug" in done.stdout
    for heavy in (b"torch", b"transformers", b"starlette", b"huggingface_hub"):
        assert b"| " + heavy not in done.stderr


def test_version(tmp_path: Path) -> None:
    assert penstock("--version", home=tmp_path).stdout.decode().strip() == f"penstock {__version__}"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["genrate"], "Did you mean `generate`?"),
        (["xyzzy"], "No such command 'xyzzy'"),
        (["generate"], "Missing argument 'MODEL'"),
        (["generate", "demo"], "Missing option"),
        (["generate", "demo", "-i", "x", "-o", "y", "--max-new-token", "3"], "--max-new-tokens"),
        (["generate", "demo", "-i", "x", "-o", "y", "--max-new-tokens", "0"], "0 is out of bounds (at least 1"),
        (["generate", "demo", "-i", "x", "-o", "y", "--max-new-tokens", "1.5"], "'1.5' is not a whole number"),
        (["generate", "demo", "-i", "x", "-o", "y", "--temperature", "nan"], "out of bounds"),
        (["generate", "demo", "-i", "x", "-o", "y", "--temperature", "-1"], "out of bounds (at least 0"),
        (["generate", "demo", "-i", "x", "-o", "y", "--top-p", "0"], "above 0, at most 1"),
        (["generate", "demo", "-i", "x", "-o", "y", "--temperature", "inf"], "out of bounds"),
        (["generate", "demo", "-i", "x", "-o", "y", "--temperature", "warm"], "not a number"),
        (["generate", "demo", "-i", "x", "-o", "y", "--dtype", "int3"], "'int3' is not one of"),
        (["generate", "demo", "-i", "x", "-o", "-", "--json"], "both write to stdout"),
        (["chat"], "penstock chat demo"),
        (["chat", "--url", "http://x", "--uds", "y"], "give one"),
        (["chat", "demo", ""], "question is empty"),
        (["chat", "--url", "ftp://x", "hello"], "not the URL of a server"),
        (["--config", "p.toml", "doctor"], "not TOML"),
    ],
)
def test_usage_errors_are_2(tmp_path: Path, args: list[str], words: str) -> None:
    (tmp_path / "p.toml").write_text("[generate\n")
    done = penstock(*args, home=tmp_path, cwd=tmp_path)
    text = done.stderr.decode()
    assert done.returncode == 2, text
    assert words in " ".join(text.split())
    assert "Traceback" not in text
    assert len(text.splitlines()) <= 6


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    """Each layer sets a value that is refused, so the message shows which one counted."""
    (tmp_path / "config" / "penstock").mkdir(parents=True)
    file = tmp_path / "config" / "penstock" / "config.toml"
    file.write_text('[generate]\nmax-new-tokens = -3\ndtype = "bfloat16"\n')
    args = ["generate", "demo", "-i", "x", "-o", "y"]
    assert b"-3 is out of bounds" in penstock(*args, home=tmp_path).stderr
    done = penstock(*args, home=tmp_path, PENSTOCK_MAX_NEW_TOKENS="-2")
    assert b"-2 is out of bounds" in done.stderr
    assert b"in the environment: PENSTOCK_MAX_NEW_TOKENS" in done.stderr
    done = penstock(*args, "--max-new-tokens", "-1", home=tmp_path, PENSTOCK_MAX_NEW_TOKENS="-2")
    assert b"-1 is out of bounds" in done.stderr
    other = tmp_path / "other.toml"
    other.write_text("[generate]\nmax_new_tokens = -9\n")
    assert b"-9 is out of bounds" in penstock("--config", other, *args, home=tmp_path).stderr
    assert b"-9 is out of bounds" in penstock(*args, home=tmp_path, PENSTOCK_CONFIG=str(other)).stderr


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ("[generate]\nmax-new-token = 3\n", 2, ["'max_new_token'", "Did you mean 'max_new_tokens'?"]),
        ("[generate]\nmax-new-tokens = true\n", 2, ["True is not a whole number"]),
        ("[genrate]\nx = 3\n", 2, ["'genrate', which is not a command"]),
        ("dtype = 3\n", 2, ["'dtype', which is not a command", "[generate]"]),
        (None, 3, ["does not exist"]),
    ],
)
def test_a_configuration_file_with_mistakes(tmp_path: Path, content: str | None, code: int, words: list[str]) -> None:
    file = tmp_path / "p.toml"
    if content is not None:
        file.write_text(content)
    done = penstock("--config", file, "generate", "demo", "-i", "x", "-o", "y", home=tmp_path)
    check_error(done, code, "p.toml", *words)


def test_a_traceback_only_with_debug(tmp_path: Path) -> None:
    plain = penstock("generate", "nosuch", "-i", "x", "-o", "y", home=tmp_path)
    check_error(plain, 4, "no model 'nosuch'")
    for done in (
        penstock("--debug", "generate", "nosuch", "-i", "x", "-o", "y", home=tmp_path),
        penstock("generate", "nosuch", "-i", "x", "-o", "y", "--debug", home=tmp_path),
        penstock("generate", "nosuch", "-i", "x", "-o", "y", home=tmp_path, PENSTOCK_DEBUG="1"),
    ):
        assert done.returncode == 4
        assert b"Traceback" in done.stderr
        assert b"Error: There is no model 'nosuch'" in done.stderr


def test_an_error_cannot_drive_the_terminal(tmp_path: Path) -> None:
    done = penstock("generate", "\x1b[2Jevil\x07\n\r", "-i", "x", "-o", "y", home=tmp_path)
    assert done.returncode == 4
    assert b"\x1b" not in done.stderr
    assert b"\x07" not in done.stderr
    assert b"\\x1b[2Jevil" in done.stderr


def test_a_reader_that_is_gone_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen(
        command("doctor", "--quick"), env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert stderr == b""
