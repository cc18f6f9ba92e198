"""`penstock.LLM` as people use it, in a program of their own."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import pytest

import penstock
from penstock import LLM, PenstockError
from penstock.batch.llm import Asked
from penstock.batch.parameters import Parameters
from tests.process import environment

GREEDY = {"max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def llm(tiny_llama: Path) -> Iterator[LLM]:
    with LLM(tiny_llama, dtype="float32", threads=1, max_batch_size=8, max_batch_total_tokens=8192) as found:
        yield found


def test_one_and_many(llm: LLM) -> None:
    texts = ["the quick brown fox", "seven wizards", "the quick brown fox"]
    one = llm.generate(texts[0], **GREEDY)
    many = llm.generate(texts, **GREEDY)
    assert many[0].text == many[2].text == one.text
    assert [result.id for result in many] == [0, 1, 2]
    assert one.generated_tokens == 6
    ids = llm.generate([[0, 5, 9]], max_new_tokens=2)[0]
    assert (ids.prompt, ids.prompt_tokens, ids.generated_tokens) == (None, 3, 2)
    assert llm.generate([]) == []


def test_rows_samples_and_errors(llm: LLM) -> None:
    found = llm.generate(
        [{"id": "own", "prompt": "fox", "max_new_tokens": 3, "ignore_eos": True}, "", "fox"],
        n=3, temperature=1.0, **GREEDY,
    )  # fmt: skip
    assert [(r.id, r.error is None) for r in found] == [("own", True), (1, False), (2, True)]
    assert "empty" in (found[1].error or "")
    samples = found[2].samples or []
    assert len({tuple(sample.token_ids) for sample in samples}) == 3
    assert found[2].generated_tokens == 18
    again = llm.generate({"id": 2, "prompt": "fox"}, n=3, temperature=1.0, **GREEDY)
    assert again.samples == samples  # the draws belong to the row, not to the batch
    with pytest.raises(PenstockError, match="empty"):
        llm.generate("")
    with pytest.raises(PenstockError, match="max_new_tokens"):
        llm.generate("x", max_new_tokens="many")  # type: ignore[call-overload]
    with pytest.raises(PenstockError, match="unknown field"):
        llm.generate([{"prompt": "x", "what": 1}])


def test_conversations(llm: LLM) -> None:
    alone = llm.chat("hello", **GREEDY)
    messages = [{"role": "user", "content": "hello"}]
    assert llm.chat(messages, **GREEDY).text == alone.text
    both = llm.chat([messages, [{"role": "system", "content": "be kind"}, *messages]], **GREEDY)
    assert both[0].text == alone.text
    assert both[1].prompt_tokens > both[0].prompt_tokens
    assert llm.generate("hello", chat=True, system="be kind", **GREEDY).prompt == both[1].prompt


def test_a_grammar(llm: LLM) -> None:
    grammar = {"kind": "choice", "value": ["yes", "no"]}
    assert {r.text for r in llm.generate(["a", "b"], grammar=grammar, max_new_tokens=8)} <= {"yes", "no"}


def test_embeddings(llm: LLM) -> None:
    one, two, again = llm.embed(["the fox", "seven wizards", "the fox"])
    assert again == pytest.approx(one, abs=1e-5)  # sums are made in another order where rows differ in number
    assert two != pytest.approx(one, abs=1e-2)
    assert math.isclose(math.fsum(x * x for x in two), 1, rel_tol=1e-6)
    assert llm.embed("the fox") == pytest.approx(one, abs=1e-5)
    with pytest.raises(PenstockError, match="empty"):
        llm.embed([""])


def test_large_inputs_are_read_as_they_are_needed(llm: LLM) -> None:
    read = 0

    def prompts() -> Iterator[str]:
        nonlocal read
        for read in range(100_000):
            yield f"fox {read}"

    results = llm.each(prompts(), max_new_tokens=1)
    assert len({next(results).id for _ in range(100)}) == 100
    results.close()
    assert read < 5000
    assert llm.generate("fox", **GREEDY).generated_tokens == 6  # what was left behind is forgotten


def test_an_engine_that_dies_is_replaced(llm: LLM) -> None:
    before = llm.generate("the fox", **GREEDY)
    engine = llm._engine
    assert engine is not None
    killer = threading.Timer(0.5, os.kill, (engine.pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(PenstockError, match="process ended"):
        llm.generate(["a long story"] * 6400, max_new_tokens=400, ignore_eos=True)
    assert llm.generate("the fox", **GREEDY) == before


def test_close_gives_everything_back(tiny_llama: Path) -> None:
    with LLM(tiny_llama, threads=1, max_batch_total_tokens=4096) as model:
        assert model._engine is not None
        pid = model._engine.pid
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(PenstockError, match="closed"):
        model.generate("x")
    model.close()


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(PenstockError, match="no model"):
        LLM("nosuchmodel")


def test_ctrl_c_leaves_a_model_that_works(tiny_llama: Path, tmp_path: Path) -> None:
    script = """
import sys
from penstock import LLM
with LLM(sys.argv[1], threads=1, max_batch_size=4, max_batch_total_tokens=4096) as llm:
    print("ready", flush=True)
    try:
        for _ in range(1000):
            llm.generate(["fox"] * 8, max_new_tokens=200, ignore_eos=True, progress=True)
    except KeyboardInterrupt:
        print(llm.generate("fox", max_new_tokens=3, ignore_eos=True).generated_tokens, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_llama)],
        env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, b"3\n"), err.decode()
    assert b"generating" in err  # the bar


def test_import_is_light(tmp_path: Path) -> None:
    script = """
import sys, time
since = time.perf_counter()
import penstock
seconds = time.perf_counter() - since
heavy = [name for name in ("torch", "numpy", "transformers", "msgspec", "asyncio") if name in sys.modules]
import json
penstock.LLM
print(json.dumps([seconds, heavy, "torch" in sys.modules, [n for n in ("LLM", "Result") if n in dir(penstock)]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(tmp_path), capture_output=True, check=True, timeout=30
    )
    seconds, heavy, torch, names = json.loads(done.stdout)
    assert seconds < 0.05
    assert heavy == []
    assert not torch
    assert names == ["LLM", "Result"]
    with pytest.raises(AttributeError):
        penstock.nothing  # noqa: B018


def test_what_can_be_asked_is_what_parameters_has() -> None:
    assert set(get_type_hints(Asked)) == set(Parameters.__struct_fields__)
