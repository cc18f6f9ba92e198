"""What may be asked for as a grammar, what is refused and by which words, and what attacks on the forge achieve."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from penstock.engine.forge import ForgeConfig
from penstock.engine.matcher import Vocabulary
from penstock.engine.request import Grammar
from penstock.errors import InvalidRequest
from penstock.server.grammars import Grammars
from penstock.text.grammar import GrammarRefused, GrammarSpec, blame, source_of
from tests.text.attacks import attacks
from tests.text.schemas import UNSUPPORTED, supported

DEMO = Path(__file__).parents[2] / "src/penstock/demo/model"
CONFIG = ForgeConfig(str(DEMO), 2560, [1])


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(DEMO, 2560, [1])


def run(work: Callable[[Grammars], Awaitable[Any]], config: ForgeConfig = CONFIG) -> Any:
    """Work with a forge that is ended afterwards."""

    async def inside() -> Any:
        grammars = Grammars(config)
        try:
            return await work(grammars)
        finally:
            grammars.close()

    return asyncio.run(inside())


async def answer(grammars: Grammars, spec: GrammarSpec) -> Grammar | GrammarRefused:
    try:
        return await grammars.compile_grammar(spec)
    except GrammarRefused as refused:
        return refused


def refusal(vocabulary: Vocabulary, spec: GrammarSpec) -> GrammarRefused:
    """By our own checks, or by llguidance in words of ours."""
    try:
        vocabulary.matcher(source_of(spec))
    except GrammarRefused as refused:
        return refused
    except InvalidRequest as error:
        return blame(spec, error.what)
    raise AssertionError(f"{spec} was not refused")


@pytest.mark.parametrize(("schema", "pointer"), UNSUPPORTED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_supported_is_named_with_its_place(
    vocabulary: Vocabulary, schema: dict[str, Any], pointer: str
) -> None:
    spec = GrammarSpec("json_schema", schema)
    refused = refusal(vocabulary, spec)
    keyword = pointer.rpartition("/")[2]
    assert refused.pointer == pointer
    assert f"`{keyword}` at {pointer}" in refused.what
    assert refused.what.startswith("grammar is not valid: ")


def test_300_schemas_are_taken_and_stay_as_they_were(vocabulary: Vocabulary) -> None:
    for schema in supported():
        before = json.dumps(schema)
        vocabulary.matcher(source_of(GrammarSpec("json_schema", schema)))
        assert json.dumps(schema) == before
        assert source_of(GrammarSpec("json_schema", before)) == source_of(GrammarSpec("json_schema", schema))


@pytest.mark.parametrize(
    ("schema", "text", "fits"),
    [
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{ "a" : 1 }', True),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{  "a": 1}', False),
        ({"type": "object", "properties": {"a": {"type": "integer"}}}, '{"a":\n1}', False),
        (
            {"properties": {"a": {"type": "string"}}, "additionalProperties": {"type": "integer"}},
            '{"\\u0061":1}',
            False,
        ),
        ({"type": "string", "format": "date"}, '"2024-02-29"', True),
        ({"type": "string", "format": "date"}, '"2023-02-29"', False),
        ({"type": "string", "format": "date"}, '"1900-02-29"', False),
        ({"type": "string", "format": "date"}, '"2000-02-29"', True),
        ({"type": "string", "format": "date", "pattern": "^19"}, '"2000-02-28"', False),
        ({"type": "string", "format": "time"}, '"23:59:60Z"', False),
        ({"type": "string"}, '"\\ud800"', False),
        ({"oneOf": [{"type": "null"}, {"enum": [1, 2]}], "anyOf": [{"enum": [2, 3]}]}, "2", True),
        ({"oneOf": [{"type": "null"}, {"enum": [1, 2]}], "anyOf": [{"enum": [2, 3]}]}, "1", False),
        (True, '[1,{"a":null}]', True),
        ({"properties": {"a": {}, "b": {}}, "maxProperties": 1}, '{"a":1,"b":1}', False),
        ({"properties": {"a": {}, "b": {}}, "maxProperties": 1}, '{"b":1}', True),
        ({"properties": {"a": {}}}, '{"a":1}', True),
        ({"properties": {"a": {}}}, '{"b":1}', False),
        ({"properties": {"a": {}}, "additionalProperties": True}, '{"b":1}', True),
        ({"properties": {"a": {}}, "required": ["b"]}, '{"b":1}', True),
        ({"allOf": [{"properties": {"a": {}}}, {"properties": {"b": {}}}]}, '{"a":1,"b":1}', True),
        ({"properties": {"a": {}}, "anyOf": [{"properties": {"b": {}}}]}, '{"a":1,"b":1}', True),
        ({"anyOf": [{"properties": {"a": {}}}, {"type": "null"}]}, '{"b":1}', False),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"a": {}}}}}, '{"b":1}', False),
        (
            {
                "properties": {
                    "x": {"$ref": "#/$defs/a"},
                    "y": {"allOf": [{"$ref": "#/$defs/a"}, {"required": ["b"]}]},
                },
                "$defs": {"a": {"properties": {"a": {}}}},
            },
            '{"x":{"b":1},"y":{"b":1}}',
            True,
        ),
    ],
)
def test_what_a_schema_lets_through(vocabulary: Vocabulary, schema: Any, text: str, fits: bool) -> None:
    matcher = vocabulary.matcher(source_of(GrammarSpec("json_schema", schema)))
    tokens = vocabulary._tokenizer.tokenize_str(text)
    taken = matcher.try_consume_tokens(tokens)
    assert (taken == len(tokens) and matcher.is_accepting()) == fits


@pytest.mark.parametrize(
    "spec",
    [
        GrammarSpec("regex", ""),
        GrammarSpec("regex", "a" * 4097),
        GrammarSpec("regex", 5),
        GrammarSpec("lark", None),
        GrammarSpec("lark", "x" * 70_000),
        GrammarSpec("choice", []),
        GrammarSpec("choice", "yes"),
        GrammarSpec("choice", ["a", ""]),
        GrammarSpec("choice", [str(i) for i in range(2000)]),
        GrammarSpec("json_schema", None),
        GrammarSpec("json_schema", "{"),
        GrammarSpec("json_schema", False),
        GrammarSpec("json_schema", [1]),
        GrammarSpec("json_schema", {"description": "x" * 70_000}),
        GrammarSpec("json_schema", {"a": object()}),
        GrammarSpec("json_schema", {"const": "\ud800"}),
    ],
)
def test_what_is_malformed_or_too_large(spec: GrammarSpec) -> None:
    with pytest.raises(GrammarRefused, match="grammar is not valid"):
        source_of(spec)


def test_results_are_shared_and_kept() -> None:
    async def work(grammars: Grammars) -> None:
        spec = GrammarSpec("json_schema", {"type": "object"})
        together = await asyncio.gather(*(grammars.compile_grammar(spec) for _ in range(20)))
        assert len({id(grammar) for grammar in together}) == 1
        began = time.perf_counter()
        assert await grammars.compile_grammar(spec) is together[0]
        bad = GrammarSpec("lark", "start: nowhere")
        first, second = await answer(grammars, bad), await answer(grammars, bad)
        assert isinstance(first, GrammarRefused)
        assert isinstance(second, GrammarRefused)
        assert first.what == second.what
        assert "nowhere" in first.what
        assert time.perf_counter() - began < 2

    run(work)


def test_200_attacks_end_in_time_and_starve_nobody() -> None:
    """A second in place of the server's five. Honest grammars come all the while, each once and new."""
    specs = attacks()
    assert len(specs) == 200

    async def work(grammars: Grammars) -> tuple[list[float], list[float], list[Grammar | GrammarRefused]]:
        await grammars.compile_grammar(GrammarSpec("json_object"))
        over = asyncio.Event()
        honest: list[float] = []

        async def visitor() -> None:
            while not over.is_set():
                began = time.perf_counter()
                name = f"field{len(honest)}"
                spec = GrammarSpec("json_schema", {"type": "object", "properties": {name: {"type": "integer"}}})
                assert isinstance(await answer(grammars, spec), Grammar)
                honest.append(time.perf_counter() - began)
                await asyncio.sleep(0.02)

        async def attacker(spec: GrammarSpec) -> tuple[float, Grammar | GrammarRefused]:
            began = time.perf_counter()
            result = await answer(grammars, spec)
            return time.perf_counter() - began, result

        visiting = asyncio.create_task(visitor())
        ended = []
        for start in range(0, len(specs), 20):
            ended += await asyncio.gather(*map(attacker, specs[start : start + 20]))
        over.set()
        await visiting
        return [seconds for seconds, _ in ended], honest, [result for _, result in ended]

    seconds, honest, results = run(work, msgspec.structs.replace(CONFIG, seconds=1.0))
    assert max(seconds) <= 1.5
    assert len(honest) >= 5
    assert sorted(honest)[len(honest) // 2] <= 0.5
    assert max(honest) <= 1.5
    assert sum(isinstance(result, GrammarRefused) for result in results) >= 60


@pytest.mark.parametrize("who", ["me", "flood"])
def test_a_flood_of_one_key_does_not_end_what_another_key_waits_for(who: str) -> None:
    """The honest grammar takes longer than a share: under its own key it lives, under the flood's it has to go."""
    honest = GrammarSpec("choice", sorted({f"{i * 7919:x}{i:o}" for i in range(1000)}))
    hostile = [
        GrammarSpec("json_schema", {"allOf": [{"type": "string", "pattern": f".*a.{{10}}{i}{n}.*"} for i in range(12)]})
        for n in range(40)
    ]

    async def work(grammars: Grammars) -> Grammar | GrammarRefused:
        async def compiled(spec: GrammarSpec, who: str) -> Grammar | GrammarRefused:
            try:
                return await grammars.compile_grammar(spec, who)
            except GrammarRefused as refused:
                return refused

        await grammars.compile_grammar(GrammarSpec("json_object"))
        flood = [asyncio.create_task(compiled(spec, "flood")) for spec in hostile]
        await asyncio.sleep(0.01)
        mine = await compiled(honest, who)
        for task in flood:
            task.cancel()
        return mine

    mine = run(work, msgspec.structs.replace(CONFIG, share=0.0005))
    assert isinstance(mine, Grammar if who == "me" else GrammarRefused), mine


@pytest.mark.timeout(1200)
def test_many_small_schemas_leave_nothing_behind() -> None:
    """400 schemas, 10,000 with PENSTOCK_LONG_TESTS=1; nothing is written to a disk."""
    count = 10_000 if os.environ.get("PENSTOCK_LONG_TESTS") == "1" else 400

    def resident(pid: int | str) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def work(grammars: Grammars) -> None:
        async def some(start: int) -> None:
            schemas = [{"type": "object", "properties": {f"a{start + i}": {"type": "integer"}}} for i in range(50)]
            await asyncio.gather(*(grammars.compile_grammar(GrammarSpec("json_schema", s)) for s in schemas))

        await some(0)
        assert grammars._process is not None
        before = resident("self"), resident(grammars._process.pid)
        for start in range(50, count, 50):
            await some(start)
        after = resident("self"), resident(grammars._process.pid)
        assert after[0] - before[0] < count * 20_000  # 200 MB for 10,000
        assert after[1] - before[1] < count * 20_000
        written = Path(f"/proc/{grammars._process.pid}/io").read_text().split("\nwrite_bytes: ")[1].split()[0]
        assert int(written) == 0
        for i in range(5000):
            grammars._keep(i.to_bytes(4, "little"), Grammar("x" * 2000))
        assert len(grammars._known) <= 1024
        assert sum(len(g.source) for g in grammars._known.values() if isinstance(g, Grammar)) <= 2**22

    run(work)


def test_a_forge_that_dies_is_started_again() -> None:
    async def work(grammars: Grammars) -> None:
        await grammars.compile_grammar(GrammarSpec("json_object"))
        assert grammars._process is not None
        first = grammars._process.pid
        slow = GrammarSpec(
            "json_schema", {"allOf": [{"type": "string", "pattern": f".*a.{{10}}{i}.*"} for i in range(12)]}
        )
        waiting = asyncio.create_task(answer(grammars, slow))
        await asyncio.sleep(0.1)
        os.kill(first, signal.SIGKILL)
        refused = await asyncio.wait_for(waiting, 2)
        assert isinstance(refused, GrammarRefused)
        assert "try again" in refused.what
        assert isinstance(await answer(grammars, GrammarSpec("choice", ["a"])), Grammar)
        assert grammars._process.pid != first

    run(work)


def test_a_model_without_tokenizer_says_so(tmp_path: Path) -> None:
    config = msgspec.structs.replace(CONFIG, folder=str(tmp_path))
    result = run(lambda grammars: answer(grammars, GrammarSpec("json_object")), config)
    assert isinstance(result, GrammarRefused)
    assert "no tokenizer.json" in result.what
