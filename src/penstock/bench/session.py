"""One load test: find out how the server is asked, make prompts that fit, run the stages, keep what is there when it
ends."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from penstock.bench.http import Address, Pool, Reply
from penstock.bench.load import Level, Plan, Record, Slo, Stage, StageResult, Target, key_refused, message_of
from penstock.bench.prompts import Synthetic, fit
from penstock.bench.wire import APIS, Api, Tally
from penstock.devices.probe import MachineLimits
from penstock.errors import EnvironmentFault, PenstockError, UsageError

_COUNTERS = re.compile(rb"^penstock_(weight_bytes|kv_bytes|flops|weight_size_bytes)(?:_total)? (\S+)$", re.MULTILINE)
_PROBE_TOKENS = 1


@dataclass
class LoadResult:
    """A whole load test, or as much of it as was done."""

    url: str
    api: str
    model: str
    prompt: str
    new_tokens: int
    slo: Slo
    stages: list[StageResult] = field(default_factory=list)
    weight_size: float | None = None  # bytes of a stored weight, where the server tells
    machine: MachineLimits | None = None
    flops_limit: float | None = None
    interrupted: bool = False
    hopeless: bool = False


class Client:
    """Single questions to a server, before and between the stages."""

    def __init__(self, address: Address) -> None:
        self.address, self._pool = address, Pool(address)

    async def send(self, method: str, path: str, body: bytes | None = None) -> tuple[Reply, list[bytes]]:
        """The answer, and the events of one that is a stream. Raises EnvironmentFault when nobody answers."""
        events: list[bytes] = []

        def keep(data: bytes, now: float) -> bool:
            events.append(data)
            return False

        try:
            reply = await self._pool.exchange(self.address.request(method, path, body), keep)
        except OSError as error:
            raise EnvironmentFault(
                f"No server answers at {self.address.uds or f'{self.address.host}:{self.address.port}'}.",
                f"{error.strerror or error or type(error).__name__}.",
                "Is it running? `penstock serve MODEL` prints its URL; a tunnel needs its ssh to be up.",
            ) from None
        if reply.status in (401, 403):
            raise key_refused(self.address, reply.status)
        return reply, events

    async def json(self, path: str) -> dict[str, object]:
        """The object that a path answers, {} if it does not."""
        reply, _ = await self.send("GET", path)
        try:
            found = json.loads(reply.body) if reply.status == 200 else {}
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    async def model(self) -> str:
        """The name of the first model that the server lists, "" if it lists none."""
        data = (await self.json("/v1/models")).get("data")
        first = data[0] if isinstance(data, list) and data else {}
        return str(first.get("id", "")) if isinstance(first, dict) else ""

    async def choose(self, asked: str) -> Api:
        """The API of that name; for `auto` TGI's where the server has it, else completions, else chat."""
        if asked != "auto":
            return APIS[asked]
        if "model_id" in await self.json("/info"):
            return APIS["tgi"]
        reply, _ = await self.send("POST", "/v1/completions", b"{}")
        return APIS["chat" if reply.status in (404, 405) else "completions"]

    async def count(self, api: Api, model: str, text: str, plan: Plan) -> tuple[int, Plan]:
        """Tokens of a text as the server counts them, and the plan without what the server does not understand.

        Raises EnvironmentFault when it cannot be asked, PenstockError when it does not tell the number.
        """
        reply, events = await self.send("POST", api.path, api.request(model, text, _PROBE_TOKENS, plan.ignore_eos))
        if reply.status in (400, 422) and plan.ignore_eos and "ignore_eos" in message_of(reply.body):
            return await self.count(api, model, text, replace(plan, ignore_eos=False))
        tally = Tally()
        for event in events:
            api.read(event, 0.0, tally)
        if reply.status != 200 or tally.error:
            why = tally.error or f"status {reply.status}: {message_of(reply.body)}"
            raise EnvironmentFault(f"The server does not answer {api.path}.", why, "Choose the API with --api.")
        if tally.prompt_tokens is None and api.name == "tgi":  # before TGI 3.1 only /tokenize told
            reply, _ = await self.send("POST", "/tokenize", json.dumps({"inputs": text}).encode())
            if reply.status == 200:
                return len(json.loads(reply.body)), plan
        if tally.prompt_tokens is None:
            raise PenstockError(
                "The server does not tell how many tokens a prompt has.",
                "Synthetic prompts of a given length need that.",
                "Give the text: --prompt TEXT, or --prompts FILE",
            )
        return tally.prompt_tokens, plan

    async def counters(self) -> dict[str, float]:
        """What a server of Penstock has moved and computed so far; {} for any other, and one that is gone."""
        try:
            reply, _ = await self.send("GET", "/metrics")
        except EnvironmentFault:
            return {}
        return {name.decode(): float(value) for name, value in _COUNTERS.findall(reply.body)}


async def synthetic(
    client: Client, api: Api, model: str, plan: Plan, tokens: int, shared: int, groups: int
) -> tuple[Synthetic, Plan]:
    """Prompts of so many tokens, of which `shared` begin alike, by asking the server how it counts words."""

    async def count(text: str) -> int:
        nonlocal plan
        found, plan = await client.count(api, model, text, plan)
        return found

    words = await fit(tokens, count)
    return Synthetic(words, min(words, round(words * shared / tokens)), groups), plan


async def run(
    address: Address,
    result: LoadResult,
    asked_api: str,
    asked_model: str | None,
    levels: Sequence[Level],
    sweep: bool,
    plan: Plan,
    prompts: Iterator[str] | tuple[int, int, int],
    say: Callable[[str], None],
    on_record: Callable[[Record], None],
) -> None:
    """Fill `result`. prompts: texts, or (tokens, shared tokens, groups) of synthetic ones. sweep: stop climbing
    through the levels when throughput no longer grows. Raises PenstockError; Ctrl-C leaves what there is in
    `result`."""
    client = Client(address)
    api = await client.choose(asked_api)
    model = asked_model or await client.model()
    if not model and api.name != "tgi":
        raise UsageError("The server does not list its models.", "", "Name one with --model.")
    result.api, result.model = api.name, model
    if isinstance(prompts, tuple):
        made, plan = await synthetic(client, api, model, plan, *prompts)
        prompts = made.texts(plan.seed)
        result.prompt = f"{made.words} random words" + (f", the first {made.shared} shared" if made.shared else "")
    else:
        _, plan = await client.count(api, model, next(prompts), plan) if asked_api == "auto" else (0, plan)
    main = asyncio.current_task()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: main.cancel() if main else None)
    target = Target(address, api, model)
    try:
        for number, level in enumerate(levels):
            before = await client.counters()
            result.weight_size = before.get("weight_size_bytes")
            stage = Stage(target, level, replace(plan, seed=plan.seed + number), prompts)
            try:
                await stage.run(on_record)
            except asyncio.CancelledError:
                result.interrupted = True
            except ExceptionGroup as group:  # of the stage's tasks: the key was refused
                raise group.exceptions[0] from None
            if stage.records:
                result.stages.append(stage.result(result.slo))
                _add_work(result.stages[-1], before, {} if result.interrupted else await client.counters())
                say(summary(result.stages[-1]))
            result.hopeless = stage.hopeless
            if result.interrupted or stage.hopeless or (sweep and _saturated(result.stages)):
                return
    finally:
        target.pool.close()


def _saturated(stages: Sequence[StageResult]) -> bool:
    """Whether the last level brought less than 5 % more output than the best before it."""
    rates = [stage.output_tokens_per_second for stage in stages]
    return len(rates) > 1 and rates[-1] < 1.05 * max(rates[:-1])


def _add_work(stage: StageResult, before: dict[str, float], after: dict[str, float]) -> None:
    if before and after:
        moved = sum(after[name] - before[name] for name in ("weight_bytes", "kv_bytes"))
        stage.bytes_per_second = moved / stage.seconds
        stage.flops_per_second = (after["flops"] - before["flops"]) / stage.seconds


def summary(stage: StageResult) -> str:
    """One line for people while it runs."""
    counts = ", ".join(f"{n} {outcome}" for outcome, n in stage.outcomes.items())
    return (
        f"{stage.level}: {counts} in {stage.seconds:.1f} s; {stage.output_tokens_per_second:,.1f} tokens/s, "
        f"TTFT p50 {stage.ttft.p50:.1f} ms, inter-token p50 {stage.itl.p50:.2f} ms"
    )
