"""What must be right on a GPU: kernels, tokens, determinism, failures. A part of gpu.py."""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from gpu_bench import DEMO, ROOT, Bench, Figure, at_least, at_most, equal_texts, guarded, request, run, stream


def environment(b: Bench) -> Iterator[Figure]:
    """The card and its two ceilings, measured."""
    torch = b.torch
    yield Figure("torch", torch.__version__)
    if b.device == "cpu":
        yield Figure("copy", 1e9, "B/s")
        return
    from penstock.devices import cuda

    yield Figure("card", str(cuda.cards()[0]))
    size = 4 * 2**30
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    copied = torch.empty_like(source)
    yield Figure("copy", 2 * size / gpu_seconds(b, partial(copied.copy_, source), 20), "B/s")
    x, w = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    yield Figure("matrix product bf16", 2 * 8192**3 / gpu_seconds(b, partial(torch.matmul, x, w), 20) / 1e12, "TFLOP/s")


def gpu_seconds(b: Bench, call: Callable[[], object], times: int) -> float:
    """The median by the card's own clock."""
    torch, taken = b.torch, []
    for _ in range(3):
        call()
    for _ in range(times):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        call()
        ended.record()
        ended.synchronize()
        taken.append(began.elapsed_time(ended) / 1000)
    return statistics.median(taken)


def kernels(b: Bench) -> Iterator[Figure]:
    """Every kernel against its twin."""
    file = ROOT / "benchmarks" / "gpu_kernels.py"
    if b.device == "cpu" or not file.exists():
        yield Figure("kernels", "not run here")
        return
    sys.path.insert(0, str(file.parent))
    import gpu_kernels

    result = gpu_kernels.main(max(10.0, b.left - 10))
    checks = result["checks"]
    passed, failed = checks["passed"], checks["failed"]
    yield Figure(
        "kernels that give what their twins give", f"{passed} of {passed + len(failed)}", "", "all", not failed
    )
    for name, why in failed.items():
        yield Figure(f"kernel {name}", why[:80], ok=False)
    for record in result["speed"]:
        name = " ".join(str(record[key]) for key in ("kernel", "shape", "rows") if key in record)
        yield Figure(f"kernel {name}", json.dumps({k: v for k, v in record.items() if isinstance(v, float)}))
    for name in result["unfinished"]:
        yield Figure("kernels unfinished", name[-80:])


def exact(b: Bench) -> Iterator[Figure]:
    """The demo model: what the processor makes of the same requests; the likeliest tokens in bfloat16."""
    prompts = demo_prompts(3 if b.tiny else 12)
    new = 8 if b.tiny else 64
    reference = b.load(DEMO, dummy=False, dtype="float32", device="cpu", max_batch_size=16)
    ours = b.load(DEMO, dummy=False, dtype="float32", max_batch_size=16)
    theirs = run(reference, [request(i, p, new) for i, p in enumerate(prompts)])
    yield from guarded(greedy, ours, theirs, prompts, new)
    for check in (draws, penalties, grammars, embeddings):
        yield from guarded(check, reference, ours, prompts, new)
    texts = [p + theirs[i]["ids"] for i, p in enumerate(prompts)]
    scored = [request(i, t, 1, prompt_logprobs=True, prompt_top_n=1) for i, t in enumerate(texts)]
    wide = run(reference, scored)
    for name, options in (
        ("bfloat16", {}),
        ("fp8 weights", {"quantize": "fp8"}),
        ("fp8 cache", {"kv_cache_dtype": "fp8_e4m3fn"}),
    ):
        if b.device != "cpu" or not options:
            yield from guarded(likeliest, b, wide, scored, name, options)


def greedy(ours: Any, theirs: dict[int, Any], prompts: list[list[int]], new: int) -> Iterator[Figure]:
    """Greedy float32 tokens, before steps are captured and after."""
    requests = [request(i, p, new) for i, p in enumerate(prompts)]
    for name in ("first", "with cached prefixes and graphs"):
        yield equal_texts(f"demo float32 = processor, {name}", run(ours, requests), theirs)
    while ours.prepare():
        pass
    yield equal_texts("demo float32 = processor, all captured", run(ours, requests), theirs)


def draws(reference: Any, ours: Any, prompts: list[list[int]], new: int) -> Iterator[Figure]:
    """Tokens drawn at random; a card rounds exponentials otherwise, so that a few may differ."""
    from penstock.engine.request import Sampling

    drawn = [
        request(i, p, new // 2, sampling=Sampling(temperature=0.8, top_p=0.9, seed=i)) for i, p in enumerate(prompts)
    ]
    yield equal_texts("demo float32 draws = processor's", run(ours, drawn), run(reference, drawn), must=False)


def penalties(reference: Any, ours: Any, prompts: list[list[int]], new: int) -> Iterator[Figure]:
    """Every penalty, a bias and a least length, counted and applied on the card, a step for each token."""
    from penstock.engine.request import Sampling

    rules = [
        Sampling(repetition_penalty=1.3),
        Sampling(frequency_penalty=0.8, presence_penalty=0.4),
        Sampling(count_penalty=0.5, logit_bias={11: 2.0, 40: -3.0}),
        Sampling(repetition_penalty=1.2, temperature=0.8, seed=4),
    ]
    requests = [request(i, p, new, sampling=rules[i % 3], min_new_tokens=4) for i, p in enumerate(prompts)]
    theirs = run(reference, requests)
    steps = ours.stats.steps
    found = run(ours, requests)
    taken = ours.stats.steps - steps
    yield equal_texts("demo float32 penalties = processor's", found, theirs)
    yield Figure("demo penalties: steps for each token", taken / new, "", "<= 1.2", taken <= 1.2 * new)
    drawn = [request(i, p, new, sampling=rules[3]) for i, p in enumerate(prompts)]
    yield equal_texts("demo float32 penalized draws = processor's", run(ours, drawn), run(reference, drawn), must=False)


def grammars(reference: Any, ours: Any, prompts: list[list[int]], new: int) -> Iterator[Figure]:
    """Texts that follow a regular expression, beside others that follow none."""
    from penstock.engine.request import Grammar
    from penstock.text.grammar import GrammarSpec, source_of

    try:
        import llguidance  # noqa: F401
    except ImportError:
        yield Figure("demo grammars", "not run: llguidance is not installed")
        return
    grammar = Grammar(source_of(GrammarSpec("regex", "[a-z]+( [a-z]+)*\\.")))
    requests = [request(i, p, new, **({} if i % 3 == 2 else {"grammar": grammar})) for i, p in enumerate(prompts)]
    for name in ("first", "again"):
        yield equal_texts(f"demo float32 grammars = processor's, {name}", run(ours, requests), run(reference, requests))


def embeddings(reference: Any, ours: Any, prompts: list[list[int]], _new: int) -> Iterator[Figure]:
    """Mean hidden states of prompts."""
    import numpy as np

    from penstock.engine.request import Embed

    requests = [request(i, p, 0, embed=Embed()) for i, p in enumerate(prompts)]
    pairs = zip(run(ours, requests).values(), run(reference, requests).values(), strict=True)
    rows = [[np.frombuffer(side["embedding"], np.float32) for side in pair] for pair in pairs]
    far = max(float(np.linalg.norm(a - c) / np.linalg.norm(c)) for a, c in rows)
    yield at_most("demo float32 embeddings, distance to the processor's", far, 1e-3)


def likeliest(
    b: Bench, wide: dict[int, Any], scored: list[Any], name: str, options: dict[str, Any]
) -> Iterator[Figure]:
    """The share of places where the likeliest token is that of float32."""
    half = run(b.load(DEMO, dummy=False, dtype="bfloat16", max_batch_size=16, **options), scored)
    pairs = [
        (x[0][0], y[0][0])
        for i in wide
        for x, y in zip(wide[i]["prompt_top"], half[i]["prompt_top"], strict=True)
        if x and y
    ]
    share = sum(x == y for x, y in pairs) / max(1, len(pairs))
    title = f"demo {name}: likeliest token as in float32"
    yield Figure(title, share) if options else at_least(title, share, 0.99)


def demo_prompts(count: int) -> list[list[int]]:
    """Pieces of the text that the demo model was held against, as token ids."""
    from tokenizers import Tokenizer

    text = (DEMO / "heldout.txt").read_text()
    ids = Tokenizer.from_file(str(DEMO / "tokenizer.json")).encode(text[:60000]).ids
    rng = random.Random(1)
    starts = [rng.randrange(len(ids) - 200) for _ in range(count)]
    return [ids[start : start + rng.randrange(20, 200)] for start in starts]


def guards(b: Bench) -> Iterator[Figure]:
    """Deterministic requests in any company; a step without memory."""
    yield from guarded(deterministic, b)
    yield from guarded(starved_step, b)


def deterministic(b: Bench) -> Iterator[Figure]:
    """The same bits whoever else is there, before the step is captured and after."""
    rng = random.Random(2)
    mine, new = b.prompt(rng, 150, 2000), 6 if b.tiny else 48
    others = [request(i, b.prompt(rng, rng.randrange(5, 300), 2000), rng.randrange(5, 60)) for i in range(1, 32)]
    others = others[:4] if b.tiny else others
    bits = []
    for company, budget in (([], 4096), (others[:15], 4096), (others, 100)):
        loop = b.load(DEMO, dummy=False, dtype="bfloat16", max_batch_size=32, max_batch_prefill_tokens=budget)
        asked = request(0, mine, new, logprobs=True, deterministic=True)
        for _ in range(2):
            found = run(loop, [*company[:7], asked, *company[7:]])[0]
            bits.append((found["ids"], found["logprobs"]))
    same = all(made == bits[0] for made in bits)
    yield Figure("deterministic: same bits alone, among 15, among 31", str(same), "", "True", same)


def starved_step(b: Bench) -> Iterator[Figure]:
    """A step that finds no memory fails its batch; the next one is served."""
    torch, rng = b.torch, random.Random(3)
    loop = b.load(DEMO, dummy=False, dtype="bfloat16", max_batch_size=32)
    forward, calls = loop._decoder.forward, 0

    def starved(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first computes the prompts; those that decode are soon captured, and do not pass here
            raise torch.OutOfMemoryError("injected")
        return forward(*arguments)

    loop._decoder.forward = starved
    first = run(loop, [request(i, b.prompt(rng, 60, 2000), 20 if b.tiny else 400) for i in range(8)])
    after = run(loop, [request(i, b.prompt(rng, 60, 2000), 8) for i in range(8)])
    fine = {r["finish"] for r in after.values()} == {"length"} and any(r["finish"] == "error" for r in first.values())
    yield Figure("injected OOM fails one batch, the next is served", str(fine), "", "True", fine)


def mixture(b: Bench) -> Iterator[Figure]:
    """A mixture of experts: captured, and as without graphs. Deterministic requests give the same bits either way; of
    others, parts of sums are split by what a graph may hold, and a near tie may fall the other way."""
    rng, new = random.Random(7), 8 if b.tiny else 48
    made: dict[str, dict[int, Any]] = {}
    usual: dict[str, dict[int, Any]] = {}
    for name, sizes in (("without graphs", (0,)), ("captured", (1, 2, 4, 8, 16))):
        loop = b.load(b.model("mixture"), max_batch_size=16, max_total_tokens=2048, cuda_graphs=sizes)
        while loop.prepare():
            pass
        rng.seed(7)
        prompts = [b.prompt(rng, 40, loop.limits.vocab_size) for _ in range(8)]
        made[name] = run(loop, [request(i, p, new, deterministic=True) for i, p in enumerate(prompts[:3])])
        usual[name] = run(loop, [request(i, p, new) for i, p in enumerate(prompts)])
        seconds, _busy = stream(b, loop, 1, new)
        yield Figure(f"mixture of experts bf16 batch 1, {name}", 1 / seconds, "tokens/s")
        if sizes != (0,) and b.device != "cpu":
            whole, name = loop._runner.graphs.captured, "mixture of experts: sizes captured"
            yield Figure(name, f"{whole} of {len(sizes)}", "", "all", whole == len(sizes))
        del loop
    name = "mixture of experts: captured = without graphs"
    yield equal_texts(f"{name}, deterministic", made["captured"], made["without graphs"])
    yield equal_texts(name, usual["captured"], usual["without graphs"], must=False)


def encoder(b: Bench) -> Iterator[Figure]:
    """A T5 with random weights in float32: tokens as the processor's."""
    rng, new = random.Random(8), 6 if b.tiny else 24
    folder = b.encoder_decoder()
    prompts = [b.prompt(rng, length, 500) for length in (5, 17, 17, 60)]
    requests = [request(i, p, new) for i, p in enumerate(prompts)]
    options = {"dtype": "float32", "max_batch_size": 8, "max_total_tokens": 256}
    theirs = run(b.load(folder, **{**options, "device": "cpu"}), requests)
    ours = b.load(folder, **options)
    yield equal_texts("T5 float32 = processor", run(ours, requests), theirs)
    seconds, _busy = stream(b, ours, 1, new)
    yield Figure("T5 float32 batch 1", 1 / seconds, "tokens/s")
