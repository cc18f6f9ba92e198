"""`penstock.farm` from a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.batch.farm.ledger import Ledger
from penstock.batch.farm.stats import covered, quantile, stats_of
from tests.batch.farms import live_here, make_farm
from tests.process import environment

PROGRAM = """
import json, sys
import penstock

model, folder = sys.argv[1:]
prompts = ["the quick brown fox", [0, 17, 300], {"id": "hot", "prompt": "seven wizards", "temperature": 1.2, "seed": 3}]
small = {"threads": 1, "max_batch_size": 4, "max_batch_total_tokens": 2048, "dtype": "float32"}
done = penstock.farm(prompts, model, folder, max_new_tokens=6, ignore_eos=True, progress=False, **small)
results = list(done.results())
with penstock.LLM(model, **small) as llm:
    alone = llm.generate(prompts, max_new_tokens=6, ignore_eos=True, progress=False)
again = penstock.farm(prompts, model, folder, max_new_tokens=6, ignore_eos=True, progress=False, **small)
try:
    penstock.farm(prompts[:2], model, folder, max_new_tokens=6, ignore_eos=True, **small)
except penstock.PenstockError as error:
    refused = str(error)
print(json.dumps({
    "ids": [result.id for result in results],
    "same": [(a.text, a.token_ids) == (b.text, b.token_ids) for a, b in zip(results, alone)],
    "complete": again.wait(0) and again.status().complete,
    "tokens": again.stats().tokens,
    "rows": len(penstock.Farm(folder)),
    "refused": refused,
}))
"""


def test_a_program_farms_as_it_would_generate(tiny_llama: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-c", PROGRAM, str(tiny_llama), str(tmp_path / "farm")]
    done = subprocess.run(line, env=environment(tmp_path), capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ids"] == [0, 1, "hot"]
    assert found["same"] == [True, True, True]
    assert found["complete"]
    assert (found["tokens"], found["rows"]) == (18, 3)
    assert "the prompts" in found["refused"]


def test_hours_of_a_node_count_once_however_many_workers_it_has() -> None:
    assert covered([]) == 0
    assert covered([(0, 10), (5, 20), (30, 31), (6, 7)]) == 21


def test_figures_of_a_farm(tmp_path: Path) -> None:
    spool = make_farm(tmp_path, 80)
    live_here(spool, "job.0.0.1-aa", seconds=0.05)
    ledger = Ledger(spool)
    ledger.update()
    found = stats_of(ledger, {})
    assert (found.done, found.tokens, found.total.rows) == (80, 240, 80)
    assert found.total.tokens_per_second == pytest.approx(240 / 0.5, rel=0.4)
    assert found.node_hours_per_million == pytest.approx(found.total.node_hours / 240e-6)
    assert 0.04 < (quantile(ledger, 0.1) or 0) < 0.4


def test_the_plots_as_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra `plot`")
    from penstock.batch.farm.picture import draw

    spool = make_farm(tmp_path, 80)
    live_here(spool, seconds=0.02)
    ledger = Ledger(spool)
    ledger.update()
    draw(ledger, stats_of(ledger, {}), tmp_path / "farm.png")
    assert (tmp_path / "farm.png").read_bytes().startswith(b"\x89PNG")
