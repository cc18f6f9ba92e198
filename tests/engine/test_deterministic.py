"""`deterministic`: the same request gives the same tokens and the same bits of log-probabilities in any company."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from penstock.engine.config import EngineConfig
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest, Sampling
from tests.engine.driver import Generated, generate

PROMPT = [random.Random(7).randrange(2, 512) for _ in range(150)]


def asked(deterministic: bool = True, **sampling: float) -> EngineRequest:
    return EngineRequest(
        id=0,
        prompt_ids=PROMPT,
        max_new_tokens=24,
        ignore_eos=True,
        logprobs=True,
        top_n_tokens=3,
        prompt_logprobs=True,
        deterministic=deterministic,
        sampling=Sampling(**sampling),  # type: ignore[arg-type]
    )


def company(count: int, seed: int) -> list[EngineRequest]:
    """Others, half of them with the same prompt, some deterministic too."""
    rng = random.Random(seed)
    return [
        EngineRequest(
            id=i,
            prompt_ids=PROMPT[: rng.randrange(1, 150)] if i % 2 else [rng.randrange(2, 512) for _ in range(i * 9)],
            max_new_tokens=rng.randrange(1, 40),
            ignore_eos=True,
            deterministic=i % 5 == 0,
        )
        for i in range(1, count + 1)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}])
def test_the_same_bits_in_any_company(tiny_llama: Path, dtype: str, sampling: dict[str, float]) -> None:
    def run(others: list[EngineRequest], **options: int | bool) -> Generated:
        engine = EngineLoop.load(EngineConfig(str(tiny_llama), dtype=dtype, **options))  # type: ignore[arg-type]
        generate(engine, [EngineRequest(id=99, prompt_ids=PROMPT, max_new_tokens=3)])  # its prompt is cached now
        results = generate(engine, [*others[:7], asked(**sampling), *others[7:]])
        assert engine.stats.used_blocks == 0
        assert all(len(r.ids) > 0 and r.finish == "length" for r in results.values())
        preempted.append(engine.stats.preemptions)
        return results[0]

    preempted: list[int] = []
    alone = run([])
    assert run(company(15, 1)) == alone
    assert run(company(15, 2), max_batch_prefill_tokens=48, max_batch_size=5) == alone
    assert run(company(15, 3), max_batch_prefill_tokens=7, prefix_caching=False) == alone
    assert run(company(15, 4), max_batch_total_tokens=448, max_total_tokens=192) == alone
    assert preempted[-1] > 0


def test_others_go_on_beside_it(tiny_llama: Path) -> None:
    """Steps alternate, so that nobody starves."""
    engine = EngineLoop.load(EngineConfig(str(tiny_llama), dtype="float32"))
    engine.add(asked())
    engine.add(EngineRequest(id=1, prompt_ids=PROMPT[:10], max_new_tokens=12, ignore_eos=True))
    got: dict[int, int] = {0: 0, 1: 0}
    while got[1] != 12:
        outputs = engine.step().outputs
        assert len(outputs) <= 1
        for output in outputs:
            got[output.id] += len(output.tokens)
    assert 8 <= got[0] <= 12
    engine.abort(0)
    assert not engine.has_work
    assert not engine._scheduler._turns
