"""Grammars through the engine: what a random model says under a schema is valid, whatever else is asked of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft7Validator, Draft202012Validator
from tokenizers import Tokenizer as Backend

from penstock.engine.config import EngineConfig
from penstock.engine.grammar import Cursor
from penstock.engine.loop import EngineLoop
from penstock.engine.request import EngineRequest, Grammar, Sampling
from penstock.text.grammar import GrammarSpec, Kind, source_of
from penstock.text.tokenizer import Tokenizer, load_tokenizer
from tests.checkpoints import save_tiny
from tests.engine.driver import Generated, generate
from tests.text.made import GEMMA, LLAMA, byte_fallback
from tests.text.schemas import LINKED, TREE, supported

DEMO = Path(__file__).parents[2] / "src/penstock/demo/model"
SIGHTING = {
    "type": "object",
    "properties": {
        "location": {"type": "string"},
        "activity": {"type": "string"},
        "animals_seen": {"type": "integer", "minimum": 1, "maximum": 5},
        "animals": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["location", "activity", "animals_seen", "animals"],
}


def grammar(kind: Kind, value: Any = None) -> Grammar:
    return Grammar(source_of(GrammarSpec(kind, value)))


@pytest.fixture(scope="module")
def engine(tiny_llama: Path) -> EngineLoop:
    return EngineLoop.load(EngineConfig(str(tiny_llama), dtype="float32", max_batch_size=32))


@pytest.fixture(scope="module")
def to_the_point(tiny_llama: Path) -> dict[int, float]:
    """Biases that make a random model close what it opens."""
    backend = Backend.from_file(str(tiny_llama / "tokenizer.json"))
    return {backend.token_to_id(c): 14.0 for c in '"}],'} | {1: 20.0}


def text_of(folder: Path, result: Generated) -> str:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer.decode(result.ids)


def valid(schema: dict[str, Any], text: str) -> bool:
    checker = Draft7Validator if "draft-07" in schema.get("$schema", "") else Draft202012Validator
    return bool(checker(schema, format_checker=checker.FORMAT_CHECKER).is_valid(json.loads(text)))


def test_a_random_model_follows_300_schemas(
    engine: EngineLoop, tiny_llama: Path, to_the_point: dict[int, float]
) -> None:
    schemas = supported()
    requests = [
        EngineRequest(
            i,
            [5, 6, 7 + i],
            400,
            Sampling(do_sample=True, temperature=1.3, seed=i, logit_bias=to_the_point),
            grammar=grammar("json_schema", schema),
        )
        for i, schema in enumerate(schemas)
    ]
    results = generate(engine, requests)
    finished = 0
    for i, schema in enumerate(schemas):
        result = results[i]
        assert result.error is None, (schema, result.error)
        if result.finish == "eos_token":
            finished += 1
            text = text_of(tiny_llama, result)
            assert valid(schema, text), (schema, text)
    assert finished >= 0.95 * len(schemas)


def test_the_demo_model_extracts_the_same_with_its_schema() -> None:
    engine = EngineLoop.load(EngineConfig(str(DEMO)))
    tokenizer = load_tokenizer(DEMO)
    assert tokenizer is not None
    prompt = tokenizer.encode("I saw a puppy, a cat and a raccoon during my bike ride in the park")
    free = EngineRequest(1, prompt, 100)
    bound = EngineRequest(2, prompt, 100, grammar=grammar("json_schema", SIGHTING))
    draws = [
        msgspec.structs.replace(bound, id=i, sampling=Sampling(temperature=2.0, seed=i), max_new_tokens=200)
        for i in range(3, 11)
    ]
    results = generate(engine, [free, bound, *draws])
    assert results[1].ids == results[2].ids
    assert json.loads(text_of(DEMO, results[2])) == {
        "location": "park",
        "activity": "bike ride",
        "animals_seen": 3,
        "animals": ["puppy", "cat", "raccoon"],
    }
    for request in draws:
        if results[request.id].finish == "eos_token":
            assert valid(SIGHTING, text_of(DEMO, results[request.id]))


@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", "[a-c]{3}-(x|yz)/[0-9]", r"[a-c]{3}-(x|yz)/[0-9]"),
        ("regex", "^ab?$", r"ab?"),
        ("regex", "a\nb|\\d{2}", r"a\nb|\d{2}"),
        ("choice", ['say "no"', "back\\slash", "yes\n", "日本"], r'say "no"|back\\slash|yes\n|日本'),
        ("lark", 'start: "<" /[a-z]{1,3}/ ">"', r"<[a-z]{1,3}>"),
    ],
)
def test_other_kinds_match_whole(engine: EngineLoop, tiny_llama: Path, kind: Kind, value: Any, pattern: str) -> None:
    requests = [
        EngineRequest(i, [5, i + 5], 60, Sampling(do_sample=True, seed=i), grammar=grammar(kind, value))
        for i in range(10)
    ]
    for result in generate(engine, requests).values():
        assert result.finish == "eos_token"
        assert re.fullmatch(pattern, text_of(tiny_llama, result))


def test_json_object_is_any_object(engine: EngineLoop, tiny_llama: Path, to_the_point: dict[int, float]) -> None:
    sampling = [Sampling(do_sample=True, seed=i, logit_bias=to_the_point) for i in range(10)]
    requests = [EngineRequest(i, [9], 200, s, grammar=grammar("json_object")) for i, s in enumerate(sampling)]
    results = generate(engine, requests).values()
    texts = [text_of(tiny_llama, result) for result in results if result.finish == "eos_token"]
    assert len(texts) >= 8
    assert all(isinstance(json.loads(text), dict) for text in texts)


def test_a_sequence_is_the_same_alone_and_in_company(tiny_llama: Path, to_the_point: dict[int, float]) -> None:
    """Beside others, in chunks, from the prefix cache, preempted and resumed; with log-probabilities that add up."""
    shared = list(range(5, 45))
    requests = [
        EngineRequest(
            i,
            [*shared, 50 + i],
            40,
            Sampling(do_sample=i % 2 == 0, seed=i, logit_bias=to_the_point, repetition_penalty=1.1),
            logprobs=True,
            top_n_tokens=2,
            grammar=grammar("json_schema", (TREE, LINKED)[i % 2]),
        )
        for i in range(6)
    ]
    calm = EngineConfig(str(tiny_llama), dtype="float32", max_total_tokens=128)
    tight = msgspec.structs.replace(calm, max_batch_total_tokens=160, max_batch_prefill_tokens=24)
    crowd = [EngineRequest(100 + i, [60 + i] * 30, 40, ignore_eos=True, priority=-1) for i in range(3)]
    alone = {r.id: generate(EngineLoop.load(calm), [r])[r.id] for r in requests}
    engine = EngineLoop.load(tight)
    together = generate(engine, requests + crowd)
    assert engine.stats.preemptions > 0
    assert engine.stats.cached_prompt_tokens > 0
    for request in requests:
        assert together[request.id].ids == alone[request.id].ids
        for token, logprob, top in zip(
            *(getattr(together[request.id], f) for f in ("ids", "logprobs", "top")), strict=True
        ):
            assert logprob <= 0
            assert dict(top).get(token, logprob) == logprob
    assert engine.stats.used_blocks == 0


def test_ends_that_are_ignored_or_too_early(engine: EngineLoop, tiny_llama: Path) -> None:
    letters = grammar("regex", "[a-z]+")
    fixed = grammar("choice", ["the"])
    requests = [
        EngineRequest(1, [5], 20, Sampling(logit_bias={1: 100.0}), grammar=letters),
        EngineRequest(2, [5], 20, Sampling(logit_bias={1: 100.0}), grammar=letters, ignore_eos=True),
        EngineRequest(3, [5], 20, Sampling(logit_bias={1: 100.0}), grammar=letters, min_new_tokens=7),
        EngineRequest(4, [5], 20, grammar=fixed, ignore_eos=True, min_new_tokens=20),
        EngineRequest(5, [5], 1, grammar=fixed),
    ]
    results = generate(engine, requests)
    assert [results[i].finish for i in (1, 2, 3, 4)] == ["eos_token", "length", "eos_token", "eos_token"]
    assert len(results[1].ids) == 2
    assert len(results[2].ids) == 20
    assert len(results[3].ids) == 8
    assert text_of(tiny_llama, results[4]) == "the"
    assert results[5].finish == "length"


def test_a_bad_grammar_ends_its_own_request(engine: EngineLoop) -> None:
    good = EngineRequest(1, [5, 6], 8, ignore_eos=True)
    expected = generate(engine, [good])[1].ids
    sources = [
        "",
        "nonsense",
        "{}",
        '{"grammars":[{"lark_grammar":"start: x"}]}',
        '{"grammars":[{"json_schema":{"type":"x"}}]}',
    ]
    results = generate(
        engine, [good, *(EngineRequest(2 + i, [5], 8, grammar=Grammar(s)) for i, s in enumerate(sources))]
    )
    assert results[1].ids == expected
    for i, source in enumerate(sources):
        assert results[2 + i].finish == "error", source
        assert "grammar is not valid" in (results[2 + i].error or "")
    assert engine.stats.waiting == 0


def test_aborted_while_its_grammar_is_made(engine: EngineLoop) -> None:
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}
    for i in range(4):
        engine.add(EngineRequest(i, [5], 8, grammar=grammar("json_schema", {**many, "title": str(i)})))
        engine.abort(i)
    assert not engine.has_work
    assert engine.step().outputs == []


def test_a_late_mask_holds_up_its_own_sequence_only(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each move of the one grammar takes 50 ms; the sequences beside it go on, and its text is the same."""
    config = EngineConfig(str(tiny_llama), dtype="float32")
    slow = EngineRequest(1, [5], 12, grammar=grammar("regex", "[a-z ]+"), ignore_eos=True)
    others = [EngineRequest(i, [5, i], 40, ignore_eos=True) for i in (2, 3)]
    expected = generate(EngineLoop.load(config), [slow, *others])
    engine = EngineLoop.load(config)
    move = Cursor.move

    def late(cursor: Cursor, token_id: int | None) -> None:
        time.sleep(0.05)
        move(cursor, token_id)

    monkeypatch.setattr(Cursor, "move", late)
    for request in (slow, *others):
        engine.add(request)
    finished: list[int] = []
    ids: dict[int, list[int]] = {1: [], 2: [], 3: []}
    while engine.has_work:
        for output in engine.step().outputs:
            ids[output.id] += [token.id for token in output.tokens]
            finished += [output.id] if output.finish else []
    assert finished[-1] == 1
    assert ids == {i: result.ids for i, result in expected.items()}
    assert engine.stats.used_blocks == 0


def test_outputs_wider_than_the_tokenizer(tmp_path: Path) -> None:
    """Models pad their vocabulary; the ids beyond the tokenizer never come."""
    folder = save_tiny(tmp_path / "wide", "llama", vocab_size=640)
    engine = EngineLoop.load(EngineConfig(str(folder)))
    sampling = Sampling(logit_bias=dict.fromkeys(range(512, 640), 100.0))
    results = generate(engine, [EngineRequest(1, [5], 20, sampling, grammar=grammar("regex", "[a-z]{4}"))])
    assert results[1].finish == "eos_token"
    assert max(results[1].ids) < 512
    assert re.fullmatch("[a-z]{4}", text_of(folder, results[1]))


@pytest.mark.parametrize("like", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_sentencepiece_tokenizers(like: Tokenizer, tmp_path: Path) -> None:
    """Pieces with a mark for the space, and bytes for what has no piece."""
    made = byte_fallback(like.backend.decoder, without="<0xZZ>")  # no byte: llguidance breaks down over such a piece
    folder = save_tiny(tmp_path / "pieces", "llama", vocab_size=288, bos_token_id=1, eos_token_id=2)
    made.backend.save(str(folder / "tokenizer.json"))
    engine = EngineLoop.load(EngineConfig(str(folder), dtype="float32"))
    to_the_point = {made.backend.token_to_id(f"<0x{byte:02X}>"): 9.0 for byte in b'"}],'} | {2: 14.0}
    asked: list[tuple[Kind, Any]] = [
        ("regex", "[日é🦝]{3} the [a-z]{2}"),
        ("choice", ["日本 the cat", "🦝🦝", "naïve the the"]),
        ("json_schema", SIGHTING),
    ]
    sampling = Sampling(do_sample=True, temperature=1.5, logit_bias=to_the_point)
    requests = [
        EngineRequest(i, [5], 400, msgspec.structs.replace(sampling, seed=i), grammar=grammar(*asked[i // 9]))
        for i in range(9 * len(asked))
    ]
    results = generate(engine, requests)
    for request in requests:
        result, (kind, value) = results[request.id], asked[request.id // 9]
        assert result.error is None
        assert result.finish == "eos_token"
        text = made.decode(result.ids)
        if kind == "regex":
            assert re.fullmatch(value, text), text
        else:
            assert text in value if kind == "choice" else valid(value, text), text


def test_models_that_cannot_follow_grammars_say_so(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bare", "llama")
    (folder / "tokenizer.json").unlink()
    engine = EngineLoop.load(EngineConfig(str(folder)))
    results = generate(engine, [EngineRequest(1, [5], 4, grammar=grammar("json_object")), EngineRequest(2, [5], 4)])
    assert "no tokenizer.json" in (results[1].error or "")
    assert results[2].error is None


def test_without_the_package_grammars_are_refused(tiny_llama: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['llguidance'] = None\n"
        "from penstock.engine.config import EngineConfig\n"
        "from penstock.engine.loop import EngineLoop\n"
        "from penstock.engine.request import EngineRequest, Grammar\n"
        "engine = EngineLoop.load(EngineConfig(sys.argv[1]))\n"
        "engine.add(EngineRequest(1, [5], 4, grammar=Grammar('{}')))\n"
        "outputs = []\n"
        "while engine.has_work:\n"
        "    outputs += engine.step().outputs\n"
        "print(outputs[0].error, outputs[0].invalid)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tiny_llama)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("the package llguidance is not installed True"), done.stderr[-500:]
