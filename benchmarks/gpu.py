"""Every check and every figure of a GPU in one call of at most nine minutes.

    PYTHONPATH=src python benchmarks/gpu.py --json gpu.json

needs PyTorch with CUDA or ROCm, Triton, NumPy, msgspec, tokenizers and safetensors, and no network; the comparison also
needs transformers. Models are shapes with random weights, but for the bundled demo model. Each section is a process of
its own with a time limit, so that a crash loses that section alone; its figures are printed as they come, and the JSON
is written after each. What a machine lacks can be wheels on PYTHONPATH, msgspec for one. `--device cpu --tiny` runs the
same code on a processor with toy shapes: it tries the script and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src" / "penstock" / "demo" / "model"
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA_3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


def llama(hidden: int, layers: int, heads: int, kv_heads: int, wide: int, **more: Any) -> dict[str, Any]:
    """config.json of a Llama 3."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": wide,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA_3,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        **more,
    }


SHAPES = {
    "1B": llama(2048, 16, 32, 8, 8192, head_dim=64, tie_word_embeddings=True),
    "8B": llama(4096, 32, 32, 8, 14336),
    "70B": llama(8192, 80, 64, 8, 28672),
}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
TINY |= {"intermediate_size": 128, "vocab_size": 512, "max_position_embeddings": 4096}


@dataclass(frozen=True)
class Figure:
    """One line of the table. goal: what it should reach, as text; ok: whether it does, None where nobody says."""

    name: str
    value: float | str
    unit: str = ""
    goal: str = ""
    ok: bool | None = None

    def line(self) -> str:
        """The figure for people."""
        value = self.value if isinstance(self.value, str) else f"{self.value:,.4g}"
        verdict = "" if self.ok is None else "ok" if self.ok else "MISSED"
        return f"{self.name:<58} {value:>14} {self.unit:<9} {self.goal:<14} {verdict}"


def at_least(name: str, value: float, goal: float, unit: str = "") -> Figure:
    return Figure(name, value, unit, f">= {goal:g}", value >= goal)


def at_most(name: str, value: float, goal: float, unit: str = "") -> Figure:
    return Figure(name, value, unit, f"<= {goal:g}", value <= goal)


class Bench:
    """What every section works with."""

    def __init__(self, device: str, tiny: bool, seconds: float, known: dict[str, float]) -> None:
        import torch

        self.device, self.tiny, self.known = device, tiny, known
        self.deadline = time.perf_counter() + seconds
        self.torch = torch
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-gpu-"))

    @property
    def left(self) -> float:
        """Seconds of this section."""
        return self.deadline - time.perf_counter()

    def model(self, shape: str) -> Path:
        """A folder with the config.json of a shape."""
        folder = self.folder / shape
        folder.mkdir(exist_ok=True)
        config = {**SHAPES[shape], **(TINY if self.tiny else {})}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def load(self, folder: Path, *, dummy: bool = True, **options: Any) -> Any:
        """An engine on the device."""
        from penstock.engine.config import EngineConfig
        from penstock.engine.loop import EngineLoop

        def say(stage: Any) -> None:
            print(f"  {stage.name:<10} {stage.seconds:6.2f} s  {stage.text}", flush=True)

        options = {"dtype": "bfloat16", "device": self.device, **options}
        if self.tiny and dummy:
            options["max_batch_total_tokens"] = 2**15
            options["max_total_tokens"] = 2048
        return EngineLoop.load(EngineConfig(str(folder), dummy_weights=dummy, **options), say)

    def prompt(self, rng: random.Random, length: int, vocab: int) -> list[int]:
        return rng.choices(range(10, vocab), k=length)


def request(number: int, prompt: list[int], new: int, **fields: Any) -> Any:
    from penstock.engine.request import EngineRequest

    return EngineRequest(number, prompt, new, ignore_eos=True, **fields)


def run(loop: Any, requests: list[Any]) -> dict[int, Any]:
    """All requests to their end: their tokens, log-probabilities, alternatives of the prompt and how they ended."""
    found: dict[int, Any] = {r.id: {"ids": [], "logprobs": [], "prompt_top": [], "finish": ""} for r in requests}
    for r in requests:
        loop.add(r)
    while loop.has_work:
        for output in loop.step().outputs:
            result = found[output.id]
            result["ids"] += [token.id for token in output.tokens]
            result["logprobs"] += [token.logprob for token in output.tokens]
            result["prompt_top"] += output.prompt_top or []
            result["finish"] = output.finish or result["finish"]
    return found


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
    """The demo model: greedy float32 tokens of the processor; the likeliest tokens in bfloat16."""
    prompts = demo_prompts(12)
    requests = [request(i, p, 64) for i, p in enumerate(prompts)]
    reference = b.load(DEMO, dummy=False, dtype="float32", device="cpu", max_batch_size=16)
    theirs = run(reference, requests)
    ours = b.load(DEMO, dummy=False, dtype="float32", max_batch_size=16)
    for name in ("first", "with cached prefixes and graphs"):
        found = run(ours, requests)
        equal = sum(found[i]["ids"] == theirs[i]["ids"] for i in theirs)
        yield Figure(
            f"demo float32 = processor, {name}", f"{equal} of {len(theirs)}", "texts", "all", equal == len(theirs)
        )
    while ours.prepare():
        pass
    found = run(ours, [request(i, p, 64) for i, p in enumerate(prompts)])
    equal = sum(found[i]["ids"] == theirs[i]["ids"] for i in theirs)
    yield Figure(
        "demo float32 = processor, all captured", f"{equal} of {len(theirs)}", "texts", "all", equal == len(theirs)
    )
    from penstock.engine.request import Sampling

    drawn = [request(i, p, 32, sampling=Sampling(temperature=0.8, top_p=0.9, seed=i)) for i, p in enumerate(prompts)]
    a, c = run(reference, drawn), run(ours, drawn)
    equal = sum(a[i]["ids"] == c[i]["ids"] for i in a)
    yield Figure("demo float32 draws = processor's", f"{equal} of {len(a)}", "texts")
    texts = [p + theirs[i]["ids"] for i, p in enumerate(prompts)]
    scored = [request(i, t, 1, prompt_logprobs=True, prompt_top_n=1) for i, t in enumerate(texts)]
    wide = run(reference, scored)
    for name, options in (
        ("bfloat16", {}),
        ("fp8 weights", {"quantize": "fp8"}),
        ("fp8 cache", {"kv_cache_dtype": "fp8_e4m3fn"}),
    ):
        if b.device == "cpu" and options:
            continue
        half = run(b.load(DEMO, dummy=False, dtype="bfloat16", max_batch_size=16, **options), scored)
        pairs = [
            (x[0][0], y[0][0])
            for i in wide
            for x, y in zip(wide[i]["prompt_top"], half[i]["prompt_top"], strict=True)
            if x and y
        ]
        share = sum(x == y for x, y in pairs) / max(1, len(pairs))
        if options:
            yield Figure(f"demo {name}: likeliest token as in float32", share)
        else:
            yield at_least(f"demo {name}: likeliest token as in float32", share, 0.99)


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
    rng = random.Random(2)
    mine = b.prompt(rng, 150, 2000)
    others = [request(i, b.prompt(rng, rng.randrange(5, 300), 2000), rng.randrange(5, 60)) for i in range(1, 32)]
    bits = []
    for company, budget in (([], 4096), (others[:15], 4096), (others, 100)):
        loop = b.load(DEMO, dummy=False, dtype="bfloat16", max_batch_size=32, max_batch_prefill_tokens=budget)
        asked = request(0, mine, 48, logprobs=True, deterministic=True)
        found = run(loop, [*company[:7], asked, *company[7:]])[0]
        bits.append((found["ids"], found["logprobs"]))
    yield Figure(
        "deterministic: same bits alone, among 15, among 31",
        str(bits[0] == bits[1] == bits[2]),
        "",
        "True",
        bits[0] == bits[1] == bits[2],
    )
    torch = b.torch
    forward, calls = loop._decoder.forward, 0

    def starved(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("injected")
        return forward(*arguments)

    loop._decoder.forward = starved
    first = run(loop, [request(i, b.prompt(rng, 60, 2000), 400) for i in range(8)])
    after = run(loop, [request(i, b.prompt(rng, 60, 2000), 8) for i in range(8)])
    fine = {r["finish"] for r in after.values()} == {"length"} and any(r["finish"] == "error" for r in first.values())
    yield Figure("injected OOM fails one batch, the next is served", str(fine), "", "True", fine)


def stream(b: Bench, loop: Any, batch: int, new: int, prompt: int = 32) -> tuple[float, float]:
    """Seconds of a step that decodes `batch` sequences, the median after the first few; and the share of that time in
    which the device computed."""
    rng = random.Random(batch)
    vocab = loop.limits.vocab_size
    for i in range(batch):
        loop.add(request(i, b.prompt(rng, prompt, vocab), new))
    taken, busy, since = [], [], time.perf_counter()
    while loop.has_work:
        step = loop.step()
        now = time.perf_counter()
        if len(step.outputs) == batch:
            taken.append(now - since)
            busy.append(step.stats.model_seconds)
        since = now
    first = len(taken) // 4
    return statistics.median(taken[first:]), sum(busy[first:]) / sum(taken[first:])


def bandwidth(b: Bench, loop: Any, seconds: float, batch: int = 1) -> float:
    """The share of the measured copy that a step of decoding moves."""
    work = loop.cost.step([(1, 100)] * batch, batch)
    return work.bytes / seconds / b.known.get("copy", 4.3e12)


def decoding(b: Bench, loop: Any, name: str, goal_rate: float | None, goal_share: float | None) -> Iterator[Figure]:
    """Batch 1: tokens a second and the share of the bandwidth."""
    while loop.prepare() and b.left > 5:
        pass
    new = 40 if b.tiny else 256
    stream(b, loop, 1, 16)
    seconds, _busy = stream(b, loop, 1, new)
    rate, share = 1 / seconds, bandwidth(b, loop, seconds)
    yield (
        at_least(f"{name} batch 1", rate, goal_rate, "tokens/s")
        if goal_rate
        else Figure(f"{name} batch 1", rate, "tokens/s")
    )
    yield (
        at_least(f"{name} batch 1, share of copy", share, goal_share)
        if goal_share
        else Figure(f"{name} batch 1, share of copy", share)
    )


def eight(b: Bench) -> Iterator[Figure]:
    """Llama 8B in bfloat16: one stream, eight, thirty-two, the first token, a mix as people chat."""
    since = time.perf_counter()
    loop = b.load(
        b.model("8B"), max_batch_size=256, max_batch_prefill_tokens=4096, max_total_tokens=8192, prefix_caching=False
    )
    yield Figure("8B bf16 loaded in (random weights)", time.perf_counter() - since, "s")
    yield from decoding(b, loop, "8B bf16", None, 0.8)
    one, several = stream(b, loop, 1, 64)[0], stream(b, loop, 8, 64)[0]
    yield at_most("8B bf16 step of batch 8 / batch 1", several / one, 1.25)
    yield Figure("8B bf16 batch 8, share of copy", bandwidth(b, loop, several, 8))
    step, busy = stream(b, loop, 32, 128)
    yield Figure("8B bf16 batch 32", 32 / step, "tokens/s")
    yield at_least("8B bf16 batch 32: share of the time the GPU computes", busy, 0.99)
    yield at_most("8B bf16 first token of 1,000", 1000 * first_token(b, loop), 30, "ms")
    yield from mix(b, loop)


def first_token(b: Bench, loop: Any) -> float:
    """Seconds from a prompt of 1,000 tokens to its first token, nobody else there: the median of some."""
    rng, taken = random.Random(3), []
    for i in range(8):
        prompt = b.prompt(rng, 1000, loop.limits.vocab_size)
        since = time.perf_counter()
        loop.add(request(i, prompt, 2))
        while loop.has_work:
            for output in loop.step().outputs:
                if output.tokens and output.finish is None:
                    taken.append(time.perf_counter() - since)  # noqa: PERF401
    return statistics.median(taken[2:])


def mix(b: Bench, loop: Any) -> Iterator[Figure]:
    """Lengths as in people's conversations: prompts of 220 tokens and answers of 190, both with a long tail."""
    rng = random.Random(4)

    def lengths() -> tuple[int, int]:
        return min(1024, int(rng.lognormvariate(4.7, 1.1)) + 4), min(1024, int(rng.lognormvariate(4.8, 0.9)) + 4)

    seconds = 2.0 if b.tiny else min(20.0, b.left - 8)
    rate = saturate(b, loop, lengths, seconds, warm=seconds / 3)
    yield at_least("8B bf16 mix of chats, saturated", rate, 16000, "tokens/s")


def saturate(b: Bench, loop: Any, lengths: Callable[[], tuple[int, int]], seconds: float, warm: float) -> float:
    """Output tokens a second with always one more request than there is room for.

    The first ones begin part way through their answers, so that the batch is mixed from the start. warm: seconds before
    the clock starts, and at least until every row is decoding.
    """
    rng, vocab, rows = random.Random(5), loop.limits.vocab_size, loop.limits.max_batch_size
    number = live = 0

    def add(part: float = 1.0) -> None:
        nonlocal number, live
        prompt, new = lengths()
        loop.add(request(number, b.prompt(rng, prompt, vocab), max(2, int(new * part))))
        number, live = number + 1, live + 1

    for _ in range(rows):
        add(rng.random())
    began, clock, made = time.perf_counter(), 0.0, 0
    while True:
        stats = loop.step()
        for output in stats.outputs:
            made += len(output.tokens)
            if output.finish:
                live -= 1
                add()
        now = time.perf_counter()
        if not clock and now - began > warm and (stats.stats.waiting == 0 or now - began > 3 * warm):
            clock, made = now, 0
        if clock and now - clock > seconds:
            break
    print(
        f"  {stats.stats.running} running, {stats.stats.waiting} waiting, {stats.stats.preemptions} preemptions",
        flush=True,
    )
    rate = made / (now - clock)
    for i in range(number):
        loop.abort(i)
    return rate


def eight_fp8(b: Bench) -> Iterator[Figure]:
    """Llama 8B with 8-bit floats for weights and cache: one stream, and as much as goes through."""
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384, 512, 768, 1024)
    quantize = {} if b.device == "cpu" else {"quantize": "fp8", "kv_cache_dtype": "fp8_e4m3fn"}
    rows = 16 if b.tiny else 1024
    loop = b.load(
        b.model("8B"),
        max_batch_size=rows,
        max_batch_prefill_tokens=64 if b.tiny else 8192,
        max_total_tokens=4096,
        prefix_caching=False,
        cuda_graphs=sizes,
        **quantize,
    )
    yield from decoding(b, loop, "8B fp8", 400, None)
    for prompt, new, goal in ((1000, 1000, 17700), (128, 2048, 26000)):
        if b.tiny:
            prompt, new = prompt // 20, new // 20
        room = 2.0 if b.tiny else (b.left - 6) * (0.5 if new == 1000 else 1)
        rate = saturate(b, loop, lambda: (prompt, new), room * 0.6, warm=room * 0.3)  # noqa: B023
        yield at_least(f"8B fp8 {prompt}/{new} saturated", rate, goal, "tokens/s")


def small(b: Bench) -> Iterator[Figure]:
    """Llama 8B with whole numbers of 8 and 4 bits."""
    for name in ("int8", "int4"):
        loop = b.load(b.model("8B"), max_batch_size=8, max_total_tokens=4096, quantize=name)
        yield from decoding(b, loop, f"8B {name}", None, None)
        del loop


def one(b: Bench) -> Iterator[Figure]:
    """Llama 1B in bfloat16, one stream."""
    yield from decoding(b, b.load(b.model("1B"), max_batch_size=8, max_total_tokens=8192), "1B bf16", None, 0.65)


def seventy(b: Bench) -> Iterator[Figure]:
    """Llama 70B with 8-bit floats, one stream."""
    quantize = {} if b.device == "cpu" else {"quantize": "fp8"}
    since = time.perf_counter()
    loop = b.load(b.model("70B"), max_batch_size=8, max_total_tokens=8192, **quantize)
    yield Figure("70B fp8 loaded in (random weights, quantized)", time.perf_counter() - since, "s")
    yield from decoding(b, loop, "70B fp8", None, 0.8)


def against(b: Bench) -> Iterator[Figure]:
    """The same requests through transformers' continuous batching, and through ours."""
    if b.device == "cpu":
        yield Figure("transformers", "not run here")
        return
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    rng, count, new, vocab = random.Random(6), 192, 128, 128000
    prompts = [b.prompt(rng, rng.randrange(16, 512), vocab) for _ in range(count)]
    folder = b.model("8B")
    loop = b.load(folder, max_batch_size=count, max_total_tokens=2048, cuda_memory_fraction=0.6, prefix_caching=False)
    run(loop, [request(i, p, 8) for i, p in enumerate(prompts)])
    since = time.perf_counter()
    run(loop, [request(i, p, new) for i, p in enumerate(prompts)])
    ours = count * new / (time.perf_counter() - since)
    yield Figure("8B bf16, 192 requests of 16-512/128, ours", ours, "tokens/s")
    del loop
    b.torch.cuda.empty_cache()
    config = AutoConfig.from_pretrained(folder)
    with b.torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=b.torch.bfloat16, attn_implementation="sdpa").eval()
    settings = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.generate_batch(inputs=prompts[:8], generation_config=settings)
    since = time.perf_counter()
    outputs = model.generate_batch(inputs=prompts, generation_config=settings)
    seconds = time.perf_counter() - since
    made = sum(len(output.generated_tokens) for output in outputs.values())
    yield Figure(f"the same, transformers {transformers.__version__} continuous batching", made / seconds, "tokens/s")
    yield at_least("ours / transformers", ours / (made / seconds), 3)


def ready(b: Bench) -> Iterator[Figure]:
    """From a command to the first token, the checkpoint in the page cache."""
    torch, folder = b.torch, b.model("8B")
    config = json.loads((folder / "config.json").read_text())
    from safetensors.torch import save_file

    hidden, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv, heads = config["num_key_value_heads"] * config["head_dim"], config["num_attention_heads"] * config["head_dim"]
    device = "cpu" if b.device == "cpu" else "cuda"

    def made(*shape: int) -> Any:
        return (torch.randn(shape, device=device, dtype=torch.bfloat16) * 0.02).cpu()

    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, Any]) -> None:
        save_file(tensors, folder / name)
        index.update(dict.fromkeys(tensors, name))

    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        shapes = {
            "self_attn.q_proj": (heads, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, heads), "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide), "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        save(f"layer-{i}.safetensors", {f"{at}{name}.weight": made(*shape) for name, shape in shapes.items()})
    ends = {"model.embed_tokens.weight": made(vocab, hidden), "lm_head.weight": made(vocab, hidden)}
    save("ends.safetensors", {**ends, "model.norm.weight": made(hidden)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    if device == "cuda":
        torch.cuda.empty_cache()
    program = (
        "import sys, time\n"
        "from penstock.engine.config import EngineConfig\nfrom penstock.engine.loop import EngineLoop\n"
        "from penstock.engine.request import EngineRequest\n"
        "say = lambda s: print(f'  {s.name:<10} {s.seconds:6.2f} s  {s.text}', flush=True)\n"
        f"loop = EngineLoop.load(EngineConfig({str(folder)!r}, device={b.device!r}, max_total_tokens=2048), say)\n"
        "loop.add(EngineRequest(0, [5, 6, 7], 2, ignore_eos=True))\n"
        "while loop.has_work: loop.step()\n"
    )
    for _ in range(2):  # the first compiles
        since = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True)
        seconds = time.perf_counter() - since
    yield at_most("8B bf16 from command to first token, warm page cache", seconds, 15, "s")


# in the order of their worth: the function, and the most seconds it may take
SECTIONS: dict[str, tuple[Callable[[Bench], Iterator[Figure]], float]] = {
    "environment": (environment, 30),
    "kernels": (kernels, 105),  # compiles, side by side, what the others use
    "exact": (exact, 65),
    "guards": (guards, 45),
    "8B": (eight, 90),
    "8B fp8": (eight_fp8, 105),
    "1B": (one, 30),
    "70B": (seventy, 55),
    "transformers": (against, 55),
    "ready": (ready, 65),
    "small": (small, 40),
}


def section(name: str, args: argparse.Namespace) -> None:
    """Run one section in this process and append its figures, a JSON line each, to a file."""
    function, _limit = SECTIONS[name]
    known = json.loads(args.known)
    bench = Bench(args.device, args.tiny, args.seconds, known)
    with open(args.lines, "a") as lines:
        for figure in function(bench):
            print(figure.line(), flush=True)
            lines.write(json.dumps(vars(figure)) + "\n")
            lines.flush()


def main() -> int:
    """Run the sections in turn. Returns 0 when none failed and no figure missed its goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=530, help="for all of it")
    parser.add_argument("--json", dest="out", default="gpu.json")
    parser.add_argument("--only", help="names of sections, with commas between them")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes: tries the script")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--lines", help=argparse.SUPPRESS)
    parser.add_argument("--known", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.section:
        section(args.section, args)
        return 0
    names = args.only.split(",") if args.only else list(SECTIONS)
    end = time.perf_counter() + args.seconds
    report: dict[str, Any] = {}
    known: dict[str, float] = {}
    table: list[str] = []
    for name in names:
        left = end - time.perf_counter()
        seconds = min(SECTIONS[name][1], left - 2)
        if seconds < 8:
            report[name] = {"error": "no time left", "figures": []}
            table.append(f"{name}: no time left")
            continue
        print(f"\n== {name}, at most {seconds:.0f} s of {left:.0f}", flush=True)
        figures, error, taken = apart(name, seconds, args, known)
        known |= {f["name"]: f["value"] for f in figures if isinstance(f["value"], float)}
        report[name] = {"figures": figures, "error": error, "seconds": taken}
        table += [Figure(**f).line() for f in figures] + ([f"{name}: {error}"] if error else [])
        Path(args.out).write_text(json.dumps(report, indent=1))
    print("\n== all of it")
    print("\n".join(table))
    bad = [n for n, part in report.items() if part["error"] or any(f["ok"] is False for f in part["figures"])]
    print(f"\nfailed or missed: {', '.join(bad) or 'nothing'}; written to {args.out}")
    return 1 if bad else 0


def apart(
    name: str, seconds: float, args: argparse.Namespace, known: dict[str, float]
) -> tuple[list[dict[str, Any]], str, float]:
    """One section as a process of its own: its figures, what went wrong, and the seconds."""
    handle, lines = tempfile.mkstemp(suffix=".jsonl")
    os.close(handle)
    command = [sys.executable, __file__, "--section", name, "--lines", lines, "--device", args.device]
    command += ["--seconds", str(seconds - 6), "--known", json.dumps(known), *(["--tiny"] if args.tiny else [])]
    since, error = time.perf_counter(), ""
    try:
        code = subprocess.run(command, timeout=seconds, stdin=subprocess.DEVNULL).returncode
        error = f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        error = f"took more than {seconds:.0f} s"
    found = [json.loads(line) for line in Path(lines).read_text().splitlines()]
    os.unlink(lines)
    return found, error, time.perf_counter() - since


if __name__ == "__main__":
    sys.exit(main())
