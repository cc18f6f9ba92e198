"""T5 and its kin against transformers: tokens, logits, states; whatever the batch, the blocks and the preemptions."""

from __future__ import annotations

import json
import random
from array import array
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.t5.modeling_t5 import T5Attention

from penstock.engine.config import EngineConfig
from penstock.engine.encoded_step import build_encoded_step
from penstock.engine.load import planned_weight_bytes
from penstock.engine.loop import EngineLoop
from penstock.engine.request import Embed, EngineRequest, Grammar, Sampling
from penstock.engine.scheduler import Run
from penstock.engine.sequence import Sequence
from penstock.errors import InvalidRequest, ModelError, UsageError
from penstock.formats import FORMATS
from penstock.hub.checkpoint import read_checkpoint
from penstock.kernels import native
from penstock.kernels.attention import RunGroup
from penstock.kernels.relative import buckets_of
from penstock.models.config import WeightMap
from penstock.models.encoder_decoder.config import KINDS, from_configs, read_encoder_decoder
from penstock.models.encoder_decoder.model import EncoderDecoder
from penstock.plan.work import PairCost
from penstock.text.grammar import GrammarSpec, source_of
from tests.encoder_decoders import SHAPES, random_options, save_encoder_decoder, save_unigram
from tests.engine.driver import generate
from tests.engine.exactness import TIE, made_prompts


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_encoder_decoder(tmp_path_factory.mktemp("models") / "t5", SHAPES["t5"])


def load(folder: Path, **options: int | bool | str) -> EngineLoop:
    return EngineLoop.load(EngineConfig(str(folder), **{"dtype": "float32", **options}))  # type: ignore[arg-type]


def requests(rows: list[list[int]], new: int) -> list[EngineRequest]:
    return [EngineRequest(id=i, prompt_ids=row, max_new_tokens=new, ignore_eos=True) for i, row in enumerate(rows)]


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype)


@torch.inference_mode()
def theirs(model: PreTrainedModel, row: list[int], ids: list[int]) -> tuple[list[int], Tensor]:
    """What transformers would choose at each place of our answer, and all its logits."""
    given = torch.tensor([[model.config.decoder_start_token_id, *ids[:-1]]])
    scores = model(input_ids=torch.tensor([row]), decoder_input_ids=given, use_cache=False).logits[0]
    best, chosen = scores.argmax(-1), torch.tensor(ids)
    tied = scores.gather(1, chosen.unsqueeze(1)).squeeze(1) > scores.amax(-1) - TIE
    return torch.where(tied, chosen, best).tolist(), scores


@torch.inference_mode()
def our_logits(engine: EngineLoop, row: list[int], ids: list[int]) -> Tensor:
    """Our logits at every place of an answer, computed in one step. [len(ids), vocab]"""
    start_id, block_size = engine.limits.start_id, engine.limits.block_size
    assert start_id is not None
    request = EngineRequest(id=0, prompt_ids=row, max_new_tokens=len(ids))
    sequence = Sequence.of(request, 0, b"", None, frozenset(), (start_id, block_size))
    sequence.ids += ids[:-1]
    sequence.blocks = array("q", range(-(-len(sequence.ids) // block_size)))
    step = build_encoded_step([Run(sequence, len(sequence.ids))], block_size)
    cache = engine._decoder.new_cache(len(sequence.blocks), block_size)
    return engine._decoder.logits(engine._decoder.forward(step.inputs, cache))


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def check(folder: Path, rows: list[list[int]], new: int, **options: int) -> set[int]:
    """Generate for the rows together and compare every token and every logit. Returns the tokens that came.

    Random weights of T5 make rounding grow: logits that differ by more than 0.001 must be about as near to those of
    float64 as transformers' are.
    """
    engine, model = load(folder, **options), reference(folder)
    found = generate(engine, requests(rows, new))
    assert engine.stats.used_blocks == 0
    for i, row in enumerate(rows):
        ids = found[i].ids
        assert found[i].error is None
        assert len(ids) == new
        expected, scores = theirs(model, row, ids)
        assert ids == expected
        ours = our_logits(engine, row, ids)
        if apart(ours, scores) > 1e-3:
            _, exact = theirs(reference(folder, torch.float64), row, ids)
            assert apart(ours, exact) <= 1.5 * apart(scores, exact)
    return {token for result in found.values() for token in result.ids}


@pytest.mark.parametrize("name", SHAPES)
def test_tokens_and_logits_match_transformers(name: str, tmp_path: Path) -> None:
    folder = save_encoder_decoder(tmp_path, SHAPES[name])
    assert len(check(folder, made_prompts(20, 110, 512), 128, max_total_tokens=256)) > 100


def test_generation_matches_transformers_own(t5: Path) -> None:
    """Token by token, with its cache."""
    rows, model = made_prompts(4, 60, 512, seed=3), reference(t5)
    model.generation_config.eos_token_id = None
    found = generate(load(t5), requests(rows, 48))
    for i, row in enumerate(rows):
        prompt = torch.tensor([row])
        ids = model.generate(prompt, max_new_tokens=48, do_sample=False, attention_mask=torch.ones_like(prompt))
        assert found[i].ids == ids[0, 1:].tolist()


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
def test_random_configurations(model_type: str, tmp_path: Path) -> None:
    """Odd sizes of heads, other activations, buckets and starts, with and without an output matrix of its own."""
    for seed in range(5):
        rng = random.Random(f"{model_type} {seed}")
        options = random_options(model_type, rng)
        folder = save_encoder_decoder(tmp_path / str(seed), options, seed)
        check(folder, made_prompts(3, 70, options["vocab_size"], seed), 24, block_size=rng.choice([1, 8, 16]))


@pytest.mark.parametrize("model_type", KINDS)
def test_common_names_of_keys_and_absent_ones(model_type: str) -> None:
    common = {"hidden_size": 48, "head_dim": 10, "num_hidden_layers": 2, "num_attention_heads": 3}
    stated = AutoConfig.for_model(model_type, **common).to_dict()
    assert from_configs({"model_type": model_type, **common}, {}) == from_configs(stated, {})


def test_the_schedule_changes_nothing(t5: Path) -> None:
    """One at a time or all together, with blocks of any size, many encoders in a step or one, and a cache so small that
    sequences are preempted and their prompts read again."""
    rows = made_prompts(10, 60, 512, seed=1)
    expected = None
    for options in (
        {"max_batch_size": 1},
        {},
        {"block_size": 1, "max_input_tokens": 60, "max_batch_prefill_tokens": 1},
        {"max_batch_total_tokens": 160, "max_total_tokens": 128, "block_size": 8},
    ):
        engine = load(t5, **options)  # type: ignore[arg-type]
        for _ in range(2):
            got = {i: result.ids for i, result in generate(engine, requests(rows, 60)).items()}
            expected = expected or got
            assert got == expected, options
            stats = engine.current_stats()
            assert stats.used_blocks == 0
            assert stats.free_blocks + stats.cached_blocks == stats.total_blocks
    assert engine.stats.preemptions > 0


def test_equal_prompts_are_read_once(t5: Path) -> None:
    """By requests of one key; a prompt that begins alike is another, and so are states without an answer."""
    row = made_prompts(1, 90, 512, seed=9)[0][:37]
    engine = load(t5)
    encoded: list[int] = []
    encode = engine._decoder._encode  # type: ignore[attr-defined]
    engine._decoder._encode = lambda texts, watch: encoded.append(len(texts.ids)) or encode(texts, watch)  # type: ignore

    def ask(number: int, prompt: list[int], salt: bytes = b"", **more: object) -> tuple[list[int], int]:
        request = EngineRequest(number, prompt, 30, ignore_eos=True, salt=salt)
        engine.add(msgspec.structs.replace(request, **more))
        ids, cached = [], 0
        while engine.has_work:
            for output in engine.step().outputs:
                assert output.error is None
                ids += [token.id for token in output.tokens]
                cached = max(cached, output.cached_tokens)
        return ids, cached

    ask(0, row, max_new_tokens=0, embed=Embed())
    first = ask(1, row)
    assert first[1] == 0
    assert ask(2, row) == (first[0], 37)
    assert ask(3, row, salt=b"another") == (first[0], 0)
    assert ask(4, [*row[:32], 7])[1] == 0
    assert ask(5, row[:-1])[1] == 0
    assert encoded == [37, 37, 37, 33, 36]
    assert generate(load(t5, prefix_caching=False), requests([row], 30))[0].ids == first[0]


def test_without_compiled_kernels(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = made_prompts(6, 60, 512, seed=8)
    expected = generate(load(t5), requests(rows, 40))
    monkeypatch.setattr(native, "can_attend", lambda *_: False)
    monkeypatch.setattr(native, "can_rotate", lambda *_: False)
    assert generate(load(t5), requests(rows, 40)) == expected


def test_nothing_of_a_step_stays_on_the_host(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds no numbers refuses to meet those of another: prompts and decoding are all there."""
    there = torch.device("meta")
    monkeypatch.setattr("penstock.models.encoder_decoder.model.paged_attention", cross_attention)
    model = EncoderDecoder.load(None, read_encoder_decoder(t5), torch.float32, 64, device=there)
    cache = model.new_cache(40, 4)
    sequences = []
    for number, row in enumerate([[5, 6, 7], [8, 9, 10], [5, 9, 8, 7, 6]]):
        s = Sequence.of(EngineRequest(number, row, 9), number, b"", None, start=(0, 4))
        s.blocks = array("q", range(10 * number, 10 * number + 10))
        sequences.append(s)
    for new in (1, 1, 3):
        runs = [Run(s, s.pending) for s in sequences]
        step = build_encoded_step(runs, 4)
        hidden = model.forward(step.inputs.to(there), cache)
        scores = model.logits(hidden[torch.tensor(step.ending_rows)])
        assert (scores.device, scores.shape) == (there, (3, 512))
        for s in sequences:
            s.computed = len(s.ids)
            s.ids += [3] * new


def cross_attention(q: Tensor, k: Tensor, v: Tensor, groups: list[RunGroup], scale: float, _window: None) -> Tensor:
    """As a GPU has it, but for the products."""
    for group in groups:
        runs = group.on(q.device, k.shape[2])
        assert {x.device for x in (runs.q_starts, runs.contexts, runs.block_table, k, v)} == {q.device}
    return q.new_empty(q.shape).flatten(1)


def test_a_full_cache_still_holds_the_longest_sequence(t5: Path) -> None:
    """Prompts that end within a block take one more."""
    engine = load(t5, max_total_tokens=64, max_batch_total_tokens=64)
    for length in (1, 15, 16, 17, 33, 63):
        row = [7] * length
        result = generate(engine, requests([row], 64 - length))[0]
        assert (result.error, len(result.ids)) == (None, 64 - length)


def test_a_step_has_room_for_the_longest_prompt(t5: Path) -> None:
    """Positions have no end, and an encoder's prompt is not cut into chunks."""
    engine = load(t5, max_total_tokens=700, max_batch_prefill_tokens=32)
    row = made_prompts(1, 5, 512)[0] * 300
    row = row[:600]
    ids = generate(engine, requests([row, row[:3]], 20))[0].ids
    assert ids == theirs(reference(t5), row, ids)[0]
    with pytest.raises(InvalidRequest, match="must be <= 700"):
        engine.add(EngineRequest(id=9, prompt_ids=row, max_new_tokens=101))


def test_limits_are_derived_from_what_it_was_trained_on(t5: Path) -> None:
    limits = load(t5).limits
    assert (limits.max_total_tokens, limits.max_input_tokens, limits.start_id) == (256, 255, 0)
    assert limits.max_batch_prefill_tokens >= limits.max_input_tokens


def test_an_abort_gives_the_blocks_back(t5: Path) -> None:
    engine = load(t5)
    for request in requests(made_prompts(4, 60, 512), 60):
        engine.add(request)
    for _ in range(3):
        engine.step()
    assert engine.current_stats().used_blocks > 0
    for number in range(4):
        engine.abort(number)
    assert engine.current_stats().used_blocks == 0
    assert not engine.has_work


def test_penalties_are_over_the_answer(t5: Path) -> None:
    """Tokens of the prompt are not repeated by saying them once; transformers counts the decoder's tokens."""
    row, model = made_prompts(1, 60, 512, seed=5)[0], reference(t5)
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([row])
    expected = model.generate(
        prompt, max_new_tokens=40, do_sample=False, repetition_penalty=1.4, attention_mask=torch.ones_like(prompt)
    )
    request = EngineRequest(
        id=0, prompt_ids=row, max_new_tokens=40, ignore_eos=True, sampling=Sampling(repetition_penalty=1.4)
    )
    assert generate(load(t5), [request])[0].ids == expected[0, 1:].tolist()


def test_draws_depend_on_the_seed_alone(t5: Path) -> None:
    rows = made_prompts(6, 60, 512, seed=2)

    def drawn(**options: int) -> list[list[int]]:
        sampling = [Sampling(do_sample=True, top_p=0.9, seed=i) for i in range(len(rows))]
        asked = [EngineRequest(i, row, 30, sampling=s) for i, (row, s) in enumerate(zip(rows, sampling, strict=True))]
        return [result.ids for result in generate(load(t5, **options), asked).values()]

    assert drawn() == drawn(max_batch_size=1)


def test_a_grammar_begins_with_a_word_as_words_are_spelt(t5: Path) -> None:
    """With the space that the text of the answer then drops, and without; tokens that must come are one run."""
    save_unigram(t5)
    tokenizer = Tokenizer.from_file(str(t5 / "tokenizer.json"))
    asked = [
        EngineRequest(
            id=i,
            prompt_ids=row,
            max_new_tokens=40,
            grammar=Grammar(source_of(GrammarSpec("regex", "quick brown (fox|dog) jumps over 0123456789"))),
            sampling=Sampling(logit_bias={} if i % 2 else {tokenizer.token_to_id("\u2581quick"): 100.0}),
        )
        for i, row in enumerate(made_prompts(6, 60, 400))
    ]
    found = generate(load(t5), asked)
    for i, result in found.items():
        assert result.error is None
        text = tokenizer.decode(result.ids)
        assert text in ("quick brown fox jumps over 0123456789", "quick brown dog jumps over 0123456789"), text
        assert i % 2 or tokenizer.id_to_token(result.ids[0]) == "\u2581quick"


def test_the_prompt_is_not_scored(t5: Path) -> None:
    """As TGI does: the decoder was given one token, and nothing precedes it."""
    request = EngineRequest(0, [5, 6, 7], 4, logprobs=True, prompt_logprobs=True, prompt_top_n=2)
    result = generate(load(t5), [request])[0]
    assert result.prompt_logprobs == [None]
    assert len(result.ids) == 4


@pytest.mark.parametrize("pooling", ["none", "mean", "last", "first"])
def test_states_are_the_encoders(t5: Path, pooling: str) -> None:
    """Every layer's, beside requests that generate."""
    rows, model, engine = made_prompts(4, 60, 512, seed=6), reference(t5), load(t5)
    embed = Embed(tuple(range(4)), pooling)  # type: ignore[arg-type]
    for i, row in enumerate(rows):
        engine.add(EngineRequest(i, row, 0, embed=embed))
    engine.add(EngineRequest(99, rows[0], 3, ignore_eos=True))
    found: dict[int, bytes] = {}
    while engine.has_work:
        for output in engine.step().outputs:
            assert output.error is None
            if output.embedding:
                found[output.id] = output.embedding
    with torch.inference_mode():
        for i, row in enumerate(rows):
            states = torch.stack(model.encoder(torch.tensor([row]), output_hidden_states=True).hidden_states)[:, 0]
            pooled = {
                "none": states,
                "mean": states.mean(1, keepdim=True),
                "last": states[:, -1:],
                "first": states[:, :1],
            }[pooling]
            ours = np.frombuffer(found[i], np.float32).reshape(pooled.shape)
            np.testing.assert_allclose(ours, pooled.numpy(), atol=1e-4, rtol=1e-4)
    assert sorted(found) == [0, 1, 2, 3]


@pytest.mark.parametrize("quantize", [name for name in FORMATS if name != "fp8"])  # which is for GPUs
def test_every_format_runs_in_bfloat16(quantize: str, tmp_path: Path) -> None:
    """And the planned bytes are those of the weights."""
    for name in ("t5", "flan-t5"):
        folder = save_encoder_decoder(tmp_path / name, SHAPES[name])
        engine = load(folder, dtype="bfloat16", quantize=quantize)
        result = generate(engine, requests(made_prompts(3, 40, 512), 8))[2]
        assert len(result.ids) == 8, result.error
        entries = read_checkpoint(folder)
        planned = planned_weight_bytes(
            entries, read_encoder_decoder(folder), WeightMap(), torch.bfloat16, FORMATS[quantize]
        )
        stored = sum(entry.end - entry.start for entry in entries.values()) / 2
        assert 0.3 * stored <= planned <= 1.4 * stored
    assert generate(load(folder, dummy_weights=True), requests([[3, 4]], 4))[0].error is None


def test_the_work_of_a_step_is_counted(t5: Path) -> None:
    """A step that starts one sequence (an encoder's block of 16, one token) beside one that decodes behind 5 others."""
    config = read_encoder_decoder(t5)
    cost = PairCost.of(config, 2.0, 2.0)
    stored = sum(
        entry.shape[0] * entry.shape[1]
        for name, entry in read_checkpoint(t5).items()
        if len(entry.shape) == 2 and "bias" not in name and name != "shared.weight"
    )
    assert cost.parameters == stored
    work = cost.step([(17, 0, 16), (1, 16 + 5, 16)], scored=2)
    assert work.weight_bytes == 2 * (stored + 512 * 64)
    token = 2 * config.kv_elements
    assert work.kv_bytes == token * ((16 + 2 + 16) + (2 + 16 + 5))
    products = 16 * (cost.encoder + cost.between) + 2 * cost.decoder + 2 * 512 * 64
    seen = 3 * 16 * 16 + 2 * (16 + 1) + 2 * (16 + 5 + 1)  # in each layer of the encoder, and of the decoder
    assert work.flops == 2 * products + 4 * config.inner_size * seen
    assert cost.step([(1, 20, 16)], 1).weight_bytes == 2 * (cost.decoder + 512 * 64)


@pytest.mark.parametrize("both_ways", [True, False])
def test_buckets_are_those_of_transformers(both_ways: bool) -> None:
    offsets = torch.arange(-1500, 1501)
    for count, distance in ((32, 128), (8, 20), (20, 40), (33, 100), (64, 256), (16, 9)):
        expected = T5Attention._relative_position_bucket(offsets, both_ways, count, distance)
        found = buckets_of(offsets, count, distance, both_ways)
        assert torch.equal(found, expected), (count, distance)


def test_a_head_without_a_tensor_is_the_embedding_unscaled(tmp_path: Path) -> None:
    """`tie_word_embeddings: false` says how outputs are scaled, whether or not there is a matrix of its own."""
    folder = save_encoder_decoder(tmp_path, {**SHAPES["t5"], "tie_word_embeddings": False})
    assert not read_encoder_decoder(folder).scaled_head
    check(folder, made_prompts(2, 40, 512), 16)


def test_tables_that_are_stored_twice_are_read_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_encoder_decoder(tmp_path, SHAPES["t5"])
    tensors = load_file(folder / "model.safetensors")
    table = tensors.pop("shared.weight")
    tensors |= {"encoder.embed_tokens.weight": table, "decoder.embed_tokens.weight": table.clone()}
    expected = generate(load(folder), requests([[5, 6]], 8))[0].ids
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert generate(load(folder), requests([[5, 6]], 8))[0].ids == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"feed_forward_proj": "gated-snake"}, "unsupported activation 'snake'"),
        ({"relative_attention_max_distance": 16}, "32 buckets do not fit"),
        ({"relative_attention_max_distance": 2**30}, "32 buckets do not fit"),
        ({"d_kv": -1}, "`d_kv` must be a positive integer"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SHAPES["t5"], **change}))
    with pytest.raises(ModelError, match=words):
        read_encoder_decoder(tmp_path)


def test_rope_scaling_is_refused(t5: Path) -> None:
    with pytest.raises(UsageError, match="which this one has not"):
        read_encoder_decoder(t5, "dynamic", 2.0)
