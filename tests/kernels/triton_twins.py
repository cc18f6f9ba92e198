"""The GPU's kernels against plain torch at random shapes: on the interpreter by test_triton_*.py, on a card by
benchmarks/gpu_kernels.py. Every function takes a random generator and where to compute, and raises where they differ.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.engine.request import Sampling
from penstock.engine.sampler import _sharpen
from penstock.formats.dense import GatedPanels, Panels, Plain
from penstock.kernels import attention, sampling
from penstock.kernels import counts as counts_of
from penstock.kernels.attention import PagedBatch, alibi_table
from penstock.kernels.mask import Mask
from penstock.kernels.norms import ACTIVATIONS, quantize_rows
from penstock.kernels.penalty import Penalty, Tally
from penstock.kernels.sampling import DrawRule, draw_plainly, inverted, penalize_plainly, restrict_plainly
from penstock.kernels.triton.sampler import SamplerRules
from penstock.models.config import ExpertsConfig
from penstock.models.experts import Experts, stack
from penstock.models.mlp import GatedMlp, Mlp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where the tests compute: a card, or the interpreter
BFLOAT16 = {"atol": 2e-2, "rtol": 2e-2}
EXACT = {"atol": 5e-5, "rtol": 5e-5}


def seeded(seed: int) -> random.Random:
    torch.manual_seed(seed)
    return random.Random(seed)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    limits = EXACT if dtype == torch.float32 else BFLOAT16
    torch.testing.assert_close(got.float().cpu(), expected.float(), **limits)


def attends(
    rng: random.Random,
    device: str,
    dtype: torch.dtype = torch.float32,
    cache: torch.dtype | None = None,
    lengths: list[int] | None = None,
    size: int = 1,
) -> None:
    """One step of short runs and one of any, over a cache of `cache` (None: of `dtype`). size: how large it gets."""
    from penstock.kernels.triton.attention import paged_attention

    kv_heads, repeats = rng.choice([1, 2, 3]), rng.choice([1, 2, 4, 5, 7])
    dim, block_size = rng.choice([5, 16, 40, 64, 96, 128]), rng.choice([1, 3, 16, 32])
    if lengths is None:
        longest = rng.choice([1, 2, 5, 8, 9, 40 * size])
        lengths = [rng.randint(1, longest) for _ in range(rng.choice([1, 2, 5]))]
    contexts = [n + rng.choice([0, rng.randrange(150 * size)]) for n in lengths]
    width = -(-max(contexts) // block_size)
    num_blocks = len(lengths) * width + 3
    table = torch.randperm(num_blocks)[: len(lengths) * width].view(len(lengths), width).to(torch.int32)
    q = torch.randn(sum(lengths), kv_heads * repeats + 1, dim).to(dtype)[:, 1:]  # strided, as out of a wider product
    k, v = (torch.randn(num_blocks, kv_heads, block_size, dim).to(dtype) for _ in range(2))
    for run, context in enumerate(contexts):  # what lies past the context must not matter, whatever it is
        if context % block_size:
            v[table[run, context // block_size].long(), :, context % block_size :] = float("nan")
    k_scale = v_scale = None
    if cache is not None:
        k, v = k.to(cache), v.to(cache)
        k_scale, v_scale = (torch.rand(kv_heads) + 0.5 for _ in range(2))
    window, chunk = rng.choice([None, None, 1, 9, 50]), rng.choice([None, None, 7, 64])
    softcap = rng.choice([None, None, 3.0])
    alibi = rng.choice([None, None, alibi_table(q.shape[1], max(contexts))])
    scale = dim**-0.5

    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch = PagedBatch(
        *(starts.to(device), torch.tensor(contexts, dtype=torch.int32).to(device), table.to(device)),
        rows=sum(lengths),
        max_length=max(lengths),
        max_context=width * block_size,
        fixed_splits=rng.random() < 0.3,
    )
    options = {"softcap": softcap, "chunk": chunk, "alibi": None if alibi is None else alibi.to(device)}
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    scales = {name: None if s is None else s.to(device) for name, s in scales.items()}
    got = paged_attention(q.to(device), k.to(device), v.to(device), [batch], scale, window, **options, **scales)

    host = PagedBatch(starts, batch.contexts.cpu(), table, batch.rows, batch.max_length, batch.max_context)
    options["alibi"] = alibi
    k, v = k.float().nan_to_num_(), v.float().nan_to_num_()
    if k_scale is not None and v_scale is not None:
        k, v = k * k_scale.view(-1, 1, 1), v * v_scale.view(-1, 1, 1)
    plain = attention.paged_attention(q.float(), k, v, [host], scale, window, **options)
    close(got, plain, dtype)


def writes(rng: random.Random, device: str, dtype: torch.dtype, cache: torch.dtype, scaled: bool) -> None:
    """Rotary positions and the write into the cache."""
    from penstock.kernels.triton.rotary import rotate_into_cache

    heads, kv_heads, block_size = rng.choice([1, 4, 6]), rng.choice([1, 2, 5]), rng.choice([1, 3, 16])
    dim, tokens = rng.choice([5, 16, 40, 128]), rng.choice([1, 2, 9])
    qkv = torch.randn(tokens, heads + 2 * kv_heads, dim).to(dtype) * 3
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    angles = torch.randn(tokens, 1, dim // 2) if dim % 2 == 0 else torch.zeros(tokens, 1, dim)
    angles = torch.cat((angles, angles), dim=2)[..., :dim]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    blocks = tokens // block_size + 3
    slots = torch.randperm(blocks * block_size)[:tokens].to(torch.int32)
    slots[rng.randrange(tokens)] = -1
    shape = (blocks, kv_heads, block_size, dim)
    got = [torch.zeros(shape, device=device).to(cache) for _ in range(2)]
    expected = [torch.zeros(shape).to(cache if cache.itemsize == 1 else torch.float32) for _ in range(2)]
    scales = [torch.rand(kv_heads) * 0.1 + 0.01 for _ in range(2)] if scaled else [None, None]
    inputs = (q, k, v, cos, sin, slots)
    wide = (x.float() if x.is_floating_point() else x for x in inputs)
    turned = attention.rotate_into_cache(*wide, *expected, *scales)
    result = rotate_into_cache(
        *(x.to(device) for x in inputs), *got, *(None if s is None else s.to(device) for s in scales)
    )
    close(result, turned, dtype)
    for a, b in zip(got, expected, strict=True):
        if cache.itemsize == 1:  # a number between two may go either way
            torch.testing.assert_close(a.float().cpu(), b.float(), atol=0.01, rtol=0.13)
        else:
            close(a, b, dtype)


def multiplies(rng: random.Random, device: str, dtype: torch.dtype, form: str, rows: int, size: int = 1) -> None:
    """A projection with bias and residual, and a gated MLP."""
    from penstock.kernels.triton import product

    n, k = rng.choice([7, 16, 40]) * size, rng.choice([64, 192, 1088]) * size
    x, residual = torch.randn(rows, k + 8).to(dtype)[:, 8:], torch.randn(rows, n).to(dtype)
    weights = tuple((torch.randn(n, k) / k**0.5).to(dtype) for _ in range(2))
    biases = tuple(torch.randn(n).to(dtype) for _ in range(2))
    activation = rng.choice(sorted(product.KINDS))
    plain = product.pack(form, (weights[0].to(device),), (biases[0].to(device),), None)
    gated = product.pack(form, tuple(w.to(device) for w in weights), (biases[0].to(device), None), activation)
    stored = product.widened(gated, torch.float32).cpu().float()
    error = {"bf16": 0.0, "fp8": 0.04, "int8": 0.012, "int4": 0.15}[form]
    whole = torch.cat(weights).float()
    assert (stored - whole).norm() <= error * whole.norm()
    y = x.float() @ stored[:n].T + biases[0].float()
    up = x.float() @ stored[n:].T
    for got, expected in (
        (product.multiply(plain, x.to(device), residual.to(device)), y + residual.float()),
        (product.multiply(gated, x.to(device)), ACTIVATIONS[activation](y) * up),
    ):
        if form == "fp8" and rows > 64 and device != "cpu":  # x is rounded to 8 bits too
            assert (got.float().cpu() - expected).norm() <= 0.06 * expected.norm()
        else:
            close(got, expected, dtype)


def an_expert(device: str, form: str, dtype: torch.dtype, hidden: int, wide: int) -> GatedMlp:
    """A random gated MLP, packed as a GPU has it."""
    from penstock.kernels.triton import product

    def matrix(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype)

    gate, up, down = matrix(wide, hidden), matrix(wide, hidden), matrix(hidden, wide)
    return GatedMlp(
        GatedPanels(product.pack(form, (gate, up), (None, None), "silu"), "silu"),
        Panels(product.pack(form, (down,), (matrix(1, hidden)[0],), None)),
    )


def mixes(
    rng: random.Random, device: str, dtype: torch.dtype, form: str, rows: int, weighs_input: bool, size: int = 1
) -> None:
    """A mixture of experts by launches of a fixed shape, and its experts one by one."""
    count, hidden, wide = rng.choice([3, 5, 8]), 64 * size, 128 * size
    before: list[Mlp] = [an_expert(device, form, dtype, hidden, wide) for _ in range(count)]
    stacked, experts = stack(before)
    assert stacked is not None
    router = Plain(torch.randn(count, hidden, device=device).to(dtype), None)
    config = ExpertsConfig((True,), count, rng.choice([1, 2, 3]), wide, weighs_input=weighs_input)
    mixture = Experts(config, router, None, experts, stacked, None, None)
    x, residual = (torch.randn(rows, hidden, device=device).to(dtype) for _ in range(2))
    one_by_one = replace(mixture, experts=before, stacked=None)
    close(mixture(x, residual), one_by_one(x, residual).cpu(), dtype)
    close(mixture(x), one_by_one(x).cpu(), dtype)


def normalizes(rng: random.Random, device: str, dtype: torch.dtype) -> None:
    """Norms of strided rows, rows in 8 bits, activations of two halves."""
    from penstock.kernels.triton import activation, norms

    n, inner, tokens = rng.choice([5, 64, 200]), rng.choice([1, 3]), rng.choice([1, 4])
    x = torch.randn(tokens, inner + 2, n).to(dtype)[:, 1 : 1 + inner]
    weight, bias = torch.randn(n).to(dtype), torch.randn(n).to(dtype)
    wide, moved = x.float(), x.to(device)
    moved = torch.cat((moved, moved), dim=1)[:, :inner]  # the strides of a split
    for kind, b in (("rms", None), ("layer", bias)):
        got = norms.norm(moved, kind, weight.to(device), None if b is None else b.to(device), 1e-5)[0]
        if kind == "rms":
            close(got, F.rms_norm(wide, (n,), weight.float(), 1e-5), dtype)
        else:
            close(got, F.layer_norm(wide, (n,), weight.float(), bias.float(), 1e-5), dtype)
    rows = torch.randn(tokens, n).to(dtype)
    for narrow in (torch.int8, torch.float8_e4m3fn):
        values, scales = norms.norm(rows.to(device), "none", narrow=narrow)
        expected, by_row = quantize_rows(rows.cpu(), narrow)
        torch.testing.assert_close(scales.cpu(), by_row)
        step = 1 if narrow == torch.int8 else 32
        assert (values.float().cpu() - expected.float()).abs().max() <= step
        back = values.float().cpu() * scales.cpu().unsqueeze(1)
        assert (back - rows.float()).abs().max() <= by_row.max() * step
    kind = rng.choice(sorted(activation.KINDS))
    halves = torch.randn(tokens, 2 * n).to(dtype)
    got = activation.gate_product(halves.to(device), activation.KINDS[kind])
    close(got, ACTIVATIONS[kind](halves[:, :n].float()) * halves[:, n:].float(), dtype)


def rules_of(rows: list[DrawRule], typical: list[float], device: str) -> SamplerRules:
    def column(values: list, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return SamplerRules(
        temperature=column([r.temperature for r in rows]),
        top_k=column([r.top_k for r in rows], torch.int32),
        top_p=column([r.top_p for r in rows]),
        typical_p=column(typical),
        min_p=column([r.min_p for r in rows]),
        at=column([r.at for r in rows], torch.float64),
    )


def draws(rng: random.Random, device: str, vocab: int, rows: int, spread: float) -> None:
    """Draws of rows with rules of their own are those of the processor."""
    from penstock.kernels.triton.sampler import draw

    scores = torch.randn(rows, vocab) * spread
    scores[torch.rand(rows, vocab) < 0.1] = float("-inf")
    scores[0, : vocab // 2] = float("-inf")  # as a grammar leaves it
    rules = [
        DrawRule(
            temperature=rng.choice([0.01, 0.7, 1.0, 3.0]),
            top_p=rng.choice([1.0, 1.0, 0.3, 0.9, 0.999]),
            min_p=rng.choice([0.0, 0.0, 0.05, 0.5]),
            top_k=rng.choice([0, 0, 1, 3, 50, 2000]),
            at=rng.random(),
        )
        for _ in range(rows)
    ]
    ids, logprobs = draw(scores.to(device), rules_of(rules, [1.0] * rows, device))
    expected, expected_logprobs = draw_plainly(scores.clone(), rules)
    same = ids.cpu() == expected
    assert int(same.sum()) >= (rows if device == "cpu" else rows - rows // 8)  # a card rounds exponentials otherwise
    torch.testing.assert_close(logprobs.cpu()[same], expected_logprobs[same], atol=1e-4, rtol=1e-4)

    typical = [rng.choice([0.2, 0.5, 0.95]) for _ in range(rows)]
    ids, logprobs = draw(scores.to(device), rules_of(rules, typical, device))
    others = 0
    for i, rule in enumerate(rules):
        row = scores[i].clone()
        asked = Sampling(
            temperature=rule.temperature, top_k=rule.top_k, top_p=rule.top_p, min_p=rule.min_p, typical_p=typical[i]
        )
        _sharpen(row, asked)
        expected_id = inverted(row, rule.at)
        if int(ids[i]) != expected_id:
            others += 1
            continue
        torch.testing.assert_close(logprobs[i].cpu(), row.log_softmax(0)[expected_id], atol=1e-4, rtol=1e-4)
    assert others <= (0 if device == "cpu" else rows // 8)


def penalizes(rng: random.Random, device: str, vocab: int) -> None:
    """Penalties from counted tokens, masks, and log-probabilities of given tokens."""
    from penstock.kernels.triton import penalties

    rows, slots = 4, 6
    scores = torch.randn(rows, vocab)
    texts = [[rng.randrange(vocab) for _ in range(rng.randrange(3, 40))] for _ in range(rows)]
    prompts = [rng.randrange(1, len(t)) for t in texts]
    samplings = [
        Sampling(
            repetition_penalty=rng.choice([1.0, 1.3, 0.8]),
            frequency_penalty=rng.choice([0.0, 0.5]),
            count_penalty=rng.choice([0.0, 0.7]),
            presence_penalty=rng.choice([0.0, -0.4]),
        )
        for _ in range(rows)
    ]
    counts = torch.zeros(slots, 2, vocab, dtype=torch.int32, device=device)
    slot = rng.sample(range(slots), rows)
    slot[1] = -1
    for i, text in enumerate(texts):
        if slot[i] >= 0:  # the last token comes by itself, as in a step
            counts_of.count_text(counts, slot[i], torch.tensor(text[:-1], device=device), prompts[i])
    of_row = torch.tensor(slot, dtype=torch.int32, device=device)
    penalties.count_tokens(counts, of_row, torch.tensor([t[-1] for t in texts], device=device))

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(s, name) for s in samplings], dtype=torch.float32, device=device)

    names = ("repetition_penalty", "frequency_penalty", "count_penalty", "presence_penalty")
    length = torch.tensor([len(t) for t in texts], dtype=torch.int32, device=device)
    got = scores.to(device).clone()
    penalties.penalize(got, counts_of.PenaltyRules(of_row, *map(column, names), length), counts)
    expected = scores.clone()
    for i, text in enumerate(texts):
        if slot[i] >= 0:
            tally, asked = Tally(), samplings[i]
            tally.follow(text, prompts[i])
            rule = (asked.repetition_penalty, asked.frequency_penalty, asked.count_penalty, asked.presence_penalty)
            penalize_plainly(expected[i : i + 1], [Penalty(tally, *rule)])
    torch.testing.assert_close(got.cpu(), expected)

    words = -(-vocab // 32)
    masks = torch.randint(-(2**31), 2**31, (2, words), dtype=torch.int32)
    penalties.restrict_bits(got, masks.to(device), torch.tensor([1, -1, 0, 1], dtype=torch.int32, device=device))
    host = [None if m < 0 else Mask(vocab) for m in (1, -1, 0, 1)]
    for m, mask in zip((1, -1, 0, 1), host, strict=True):
        if mask is not None:
            mask.bits[:words] = masks[m].numpy().view(np.uint32)
    restrict_plainly(expected, host, [[], [], [], []])
    torch.testing.assert_close(got.cpu(), expected)
    withheld = [[], [3, vocab - 1], [2], list(range(vocab))]
    sampling._restrict_on_device(got, host, withheld)
    restrict_plainly(expected, host, withheld)
    torch.testing.assert_close(got.cpu(), expected)
    targets = scores.argmax(dim=1)
    told = penalties.chosen_logprobs(scores.to(device), targets.to(device))
    torch.testing.assert_close(told.cpu(), scores.log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1))
