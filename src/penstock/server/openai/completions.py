"""POST /v1/completions: prompts as they are, continued. Also scores given text (`echo` with `logprobs`)."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from penstock.server.body import parse
from penstock.server.exchange import DONE, Exchange, Header
from penstock.server.generation import TokenEvent
from penstock.server.house import House
from penstock.server.native.answers import COMPUTE_TYPE, headers
from penstock.server.openai import answers as wire
from penstock.server.openai.chat import FINGERPRINT
from penstock.server.openai.fields import look_over
from penstock.server.openai.grammar import compiled, wanted
from penstock.server.openai.logprobs import TextScores
from penstock.server.openai.models import check_model
from penstock.server.openai.prompts import TextPrompt, read_prompts
from penstock.server.openai.runs import Runs
from penstock.server.openai.sampling import Order, alternatives, answers, order
from penstock.server.openai.turn import FINISH
from penstock.server.openai.wire import CompletionRequest, StreamOptions
from penstock.server.refusal import Refusal, invalid


@dataclass(frozen=True)
class Job:
    """A request that is ready to run. Answers are numbered through: those to the first prompt, to the second, ...

    echoes: the prompt's text for each answer, None without echo. count: how many answers to a prompt are generated;
    kept: how many of them are shown.
    """

    runs: Runs
    scores: list[TextScores] | None
    echoes: list[str] | None
    count: int
    kept: int
    prompts: list[TextPrompt]
    model: str


class Completions:
    """The route."""

    def __init__(self, house: House) -> None:
        self._house = house

    async def completions(self, exchange: Exchange, raw: bytes) -> None:
        """Continuations of one or several prompts."""
        arrived = time.monotonic()
        house = self._house
        body = parse(raw, CompletionRequest)
        check_model(body.model, house)
        look_over(exchange, raw, CompletionRequest, house.config.strict)
        if body.suffix:
            text = "Suffix is not supported and can be achieved by preprocessing the prompt."
            raise Refusal(422, text, "suffix not supported", param="suffix")
        house.metrics.requests.inc()
        count = self._count(body)
        special = body.add_special_tokens is not False
        most = house.config.max_client_batch_size
        prompts = await read_prompts(house, body.prompt, "prompt", most, special)
        with house.permits.take(count * len(prompts)):
            full = await self._order(exchange, body, raw, count)
            groups = [full.generations(house, full.request(house, prompt.ids), count, arrived) for prompt in prompts]
            total = len(prompts) * count
            job = Job(
                runs=Runs(house, groups),
                scores=[self._scores(body, full) for _ in range(total)] if body.logprobs is not None else None,
                echoes=[prompt.text for prompt in prompts for _ in range(count)] if body.echo else None,
                count=count,
                kept=body.n or 1,
                prompts=prompts,
                model=house.model_name(full.adapter),
            )
            if body.stream:
                await self._stream(exchange, job, body.stream_options or StreamOptions())
            else:
                tokens = await job.runs.collect()
                await exchange.answer_json(self._whole(job, tokens), _headers(job))

    def _count(self, body: CompletionRequest) -> int:
        """How many answers to generate for each prompt."""
        shown, count = answers(body, self._house), answers(body, self._house, "best_of")
        if body.best_of is None:
            return shown
        if count < shown:
            raise invalid("`best_of` must be >= `n`", "best_of")
        if count > shown and body.stream:
            raise invalid("`best_of` > `n` is not supported when streaming tokens", "best_of")
        return count

    async def _order(self, exchange: Exchange, body: CompletionRequest, raw: bytes, count: int) -> Order:
        house = self._house
        basic = order(exchange, house, body, raw)
        if body.max_tokens == 0 and not body.echo:
            raise invalid("`max_new_tokens` must be strictly positive", "max_tokens")
        top_n = alternatives(body.logprobs, "logprobs", house)
        asked = wanted(body)
        scored = body.logprobs is not None
        if scored and body.echo and house.limits.start_id is not None:
            words = "`echo` with `logprobs` scores the prompt, which this model's encoder reads and does not predict"
            raise invalid(words, "logprobs")
        return replace(
            basic,
            logprobs=scored or count > (body.n or 1),
            top_n=top_n,
            prompt_top_n=top_n if scored and body.echo else None,
            grammar=None if asked is None else await compiled(house, exchange.key_name, *asked),
        )

    def _scores(self, body: CompletionRequest, full: Order) -> TextScores:
        return TextScores(self._house.tokenizer, full.skip_special_tokens, full.top_n)

    async def _stream(self, exchange: Exchange, job: Job, options: StreamOptions) -> None:
        identity, created = _identity(), int(time.time())
        begun = [False] * len(job.runs.all)

        def chunk(choices: list[wire.TextChoice]) -> wire.TextChunk:
            event = wire.TextChunk(
                id=identity,
                created=created,
                choices=choices,
                model=job.model,
                system_fingerprint=FINGERPRINT,
            )
            if options.continuous_usage_stats or not choices:
                event.usage = usage(job)
            elif options.include_usage:
                event.usage = None
            return event

        async with job.runs as runs:
            await exchange.start_events([])
            with exchange.kept_alive(self._house.config.keep_alive_seconds):
                async for step in runs:
                    choices: list[wire.TextChoice] = []
                    for index, tokens in step:
                        if not begun[index] and job.echoes is not None:
                            choices.append(self._echo(job, index))
                        begun[index] = True
                        choices += [self._choice(job, index, [token], token.piece) for token in tokens]
                        reason = runs.all[index].finish_reason
                        if reason:
                            choices[-1].finish_reason = FINISH[reason]
                    await exchange.event(*(chunk([choice]) for choice in choices))
        if options.include_usage:
            await exchange.event(chunk([]))
        await exchange.write(DONE)
        await exchange.end()

    def _whole(self, job: Job, tokens: list[list[TokenEvent]]) -> wire.TextCompletion:
        chosen = _best(job)
        choices: list[wire.TextChoice] = []
        for number, index in enumerate(chosen):
            generation = job.runs.all[index]
            choice = self._choice(job, index, [], generation.text)
            if job.echoes is not None:
                choice = self._echo(job, index)
                choice.text += generation.text
            if job.scores is not None:
                choice.logprobs = _joined(choice.logprobs, job.scores[index].push(tokens[index]))
            choice.index, choice.finish_reason = number, FINISH[generation.finish_reason]
            choices.append(choice)
        return wire.TextCompletion(
            id=_identity(),
            created=int(time.time()),
            model=job.model,
            system_fingerprint=FINGERPRINT,
            choices=choices,
            usage=usage(job),
        )

    @staticmethod
    def _choice(job: Job, index: int, tokens: Sequence[TokenEvent], text: str) -> wire.TextChoice:
        choice = wire.TextChoice(index=index, text=text)
        if job.scores is not None and tokens:
            choice.logprobs = job.scores[index].push(tokens)
        return choice

    @staticmethod
    def _echo(job: Job, index: int) -> wire.TextChoice:
        """The prompt as the first piece of an answer, with its log-probabilities."""
        echoes = job.echoes or []
        choice = wire.TextChoice(index=index, text=echoes[index])
        if job.scores is not None:
            choice.logprobs = job.scores[index].prompt(job.runs.all[index], echoes[index])
        return choice


def usage(job: Job) -> wire.Usage:
    """Token counts: every prompt once, every answer, shown or not."""
    generations = job.runs.all
    completion = sum(generation.generated_tokens for generation in generations)
    cached = sum(generation.cached_tokens for generation in generations[:: job.count])
    prompt = sum(len(prompt.ids) for prompt in job.prompts)
    return wire.Usage(prompt, completion, prompt + completion, wire.PromptDetails(cached))


def _headers(job: Job) -> list[Header]:
    """TGI's figures, each added up over the prompts."""
    found = {b"x-compute-type": COMPUTE_TYPE}
    for generation, prompt in zip(job.runs.all[:: job.count], job.prompts, strict=True):
        for name, value in headers(generation, prompt.text):
            if value.isdigit():
                found[name] = b"%d" % (int(found.get(name, 0)) + int(value))
    return list(found.items())


def _best(job: Job) -> list[int]:
    """The indices of the answers that are shown: of each prompt's `count`, the `kept` likeliest, best first."""
    generations = job.runs.all
    if job.count == job.kept:
        return list(range(len(generations)))
    chosen: list[int] = []
    for start in range(0, len(generations), job.count):
        of_prompt = range(start, start + job.count)
        ranked = sorted(of_prompt, key=lambda index: generations[index].mean_logprob, reverse=True)
        chosen += ranked[: job.kept]
    return chosen


def _joined(first: wire.TextLogprobs | None, then: wire.TextLogprobs) -> wire.TextLogprobs:
    if first is None:
        return then
    return wire.TextLogprobs(
        first.tokens + then.tokens,
        first.token_logprobs + then.token_logprobs,
        first.top_logprobs + then.top_logprobs,
        first.text_offset + then.text_offset,
    )


def _identity() -> str:
    return f"cmpl-{secrets.token_hex(12)}"
