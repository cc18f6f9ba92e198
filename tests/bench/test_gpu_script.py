"""The script of all GPU checks, tried on a processor with toy shapes: its own code is sound before a card is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ON_A_CARD_ONLY = {"ours / transformers"}


@pytest.mark.timeout(900)
def test_every_section_and_figure_of_the_script(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    out = tmp_path / "gpu.json"
    command = [sys.executable, "benchmarks/gpu.py", "--dry", "--seconds", "880", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=890)
    report = json.loads(out.read_text())
    assert not {name: part["error"] for name, part in report.items() if part["error"]}, done.stderr[-3000:]
    figures = {figure["name"]: figure for part in report.values() for figure in part["figures"]}
    broken = [name for name in figures if name.endswith(": failed")]
    assert not broken, done.stdout[-3000:]
    wrong = [name for name, figure in figures.items() if figure["goal"] in ("all", "True") and not figure["ok"]]
    assert not wrong
    table = done.stdout[done.stdout.index("judged by") :].splitlines()[1:]
    missing = {re.split(r"  +", line)[0] for line in table if line.endswith("not measured")}
    assert missing == ON_A_CARD_ONLY


def test_a_check_that_fails_hides_no_other() -> None:
    program = (
        "import sys; sys.path.insert(0, 'benchmarks')\n"
        "from gpu_bench import Figure, guarded\n"
        "def one():\n    yield Figure('before', 1.0)\n    raise RuntimeError('device-side assert')\n"
        "def two():\n    yield Figure('after', 2.0, ok=True)\n"
        "for check in (one, two):\n    for figure in guarded(check): print(figure.line())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["before", "one:", "after"]
    assert "MISSED" in done.stdout.splitlines()[1]
