"""How far a long job is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.cli import progress
from penstock.cli.progress import RowProgress, duration
from tests.cli.terminal import Terminal


def test_a_bar_on_a_terminal(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("the quick brown fox\n" * 30)
    args = ("-i", tmp_path / "p.txt", "-o", tmp_path / "o.jsonl", "--max-new-tokens", "4", "--threads", "1")
    terminal = Terminal("generate", tiny_llama, *args, home=tmp_path)
    assert terminal.end() == 0
    for words in ("generating", "30/30", "tokens/s", "30 of 30 rows done, 0 with errors; 120 tokens"):
        assert words in terminal.seen


def test_lines_elsewhere(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with RowProgress(10, done=4) as bar:
        bar.advance(1, 5)
    assert capsys.readouterr().err == ""  # not every step: a line every 15 s
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with RowProgress(1000, done=400) as bar:
        bar.advance(0, 5)
        bar.advance(100, 5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("400/1,000 rows, ")
    assert lines[0].endswith("time left not known yet")
    assert lines[1].startswith("500/1,000 rows, ")
    assert lines[1].endswith(" s left")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_seconds_as_people_say_them(seconds: float, words: str) -> None:
    assert duration(seconds) == words
