"""How fast a GPU is with shapes of Llama, and from a command to the first token. A part of gpu.py."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from gpu_bench import Bench, Figure, at_least, at_most, guarded, request, run, stream


def bandwidth(b: Bench, loop: Any, seconds: float, batch: int = 1) -> float:
    """The share of the measured copy that a step of decoding moves."""
    work = loop.cost.step([(1, 100)] * batch, batch)
    return work.bytes / seconds / b.known.get("copy", 4.3e12)


def decoding(b: Bench, loop: Any, name: str, goal_rate: float | None, goal_share: float | None) -> Iterator[Figure]:
    """Batch 1: tokens a second and the share of the bandwidth."""
    while loop.prepare() and b.left > 5:
        pass
    new = 12 if b.tiny else 256
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
    yield from guarded(decoding, b, loop, "8B bf16", None, 0.8)
    for check in (several, changed_scores, answer, mix):
        yield from guarded(check, b, loop)


def several(b: Bench, loop: Any) -> Iterator[Figure]:
    """Eight streams beside one, and thirty-two."""
    one, eight = stream(b, loop, 1, 64)[0], stream(b, loop, 8, 64)[0]
    yield at_most("8B bf16 step of batch 8 / batch 1", eight / one, 1.25)
    yield Figure("8B bf16 batch 8, share of copy", bandwidth(b, loop, eight, 8))
    step, busy = stream(b, loop, 32, 128)
    yield Figure("8B bf16 batch 32", 32 / step, "tokens/s")
    yield at_least("8B bf16 batch 32: share of the time the GPU computes", busy, 0.99)


def changed_scores(b: Bench, loop: Any) -> Iterator[Figure]:
    """What penalties and draws cost thirty-two streams."""
    from penstock.engine.request import Sampling

    plain = stream(b, loop, 32, 64)[0]
    penalized = stream(b, loop, 32, 64, sampling=Sampling(repetition_penalty=1.1, presence_penalty=0.3))
    yield at_most("8B bf16 step of batch 32, penalties / greedy", penalized[0] / plain, 1.15)
    yield Figure("8B bf16 batch 32, penalties: share of the time the GPU computes", penalized[1])
    drawn = stream(b, loop, 32, 64, sampling=Sampling(temperature=0.8, top_p=0.9))[0]
    yield Figure("8B bf16 step of batch 32, draws / greedy", drawn / plain)


def answer(b: Bench, loop: Any) -> Iterator[Figure]:
    """The first token of a long prompt."""
    yield at_most("8B bf16 first token of 1,000", 1000 * first_token(b, loop), 30, "ms")


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

    seconds = 0.6 if b.tiny else min(20.0, b.left - 8)
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
    yield from guarded(decoding, b, loop, "8B fp8", 400, None)
    for prompt, new, goal in ((1000, 1000, 17700), (128, 2048, 26000)):
        yield from guarded(saturated, b, loop, prompt, new, goal)


def saturated(b: Bench, loop: Any, prompt: int, new: int, goal: float) -> Iterator[Figure]:
    """As many requests of one size as go through."""
    part = 20 if b.tiny else 1
    room = 0.6 if b.tiny else (b.left - 6) * (0.5 if new == 1000 else 1)
    rate = saturate(b, loop, lambda: (prompt // part, new // part), room * 0.6, warm=room * 0.3)
    yield at_least(f"8B fp8 {prompt}/{new} saturated", rate, goal, "tokens/s")


def small(b: Bench) -> Iterator[Figure]:
    """Llama 8B with whole numbers of 8 and 4 bits."""
    for name in ("int8", "int4"):
        yield from guarded(quantized, b, name)


def quantized(b: Bench, name: str) -> Iterator[Figure]:
    """One stream with weights in a format."""
    loop = b.load(b.model("8B"), max_batch_size=8, max_total_tokens=4096, quantize=name)
    yield from decoding(b, loop, f"8B {name}", None, None)


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
