"""One turn of a conversation: what chat completions, /v1/responses and /v1/messages have in common.

A body in OpenAI's chat shape becomes a prompt (`read_prompt`) and running generations (`Turn`); their tokens become
events (`Voice`): text, reasoning, tool calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from penstock.engine.request import Image
from penstock.server.exchange import Exchange
from penstock.server.generation import Generation, TokenEvent
from penstock.server.house import House
from penstock.server.openai import wire
from penstock.server.openai.fields import unsupported
from penstock.server.openai.grammar import compiled, wanted
from penstock.server.openai.runs import Runs
from penstock.server.openai.sampling import Order, alternatives, answers, order
from penstock.server.refusal import Refusal, invalid, template_error
from penstock.text.answer import AnswerParser
from penstock.text.answer_events import Content, Event
from penstock.text.grammar import GrammarSpec
from penstock.text.reasoning import ReasoningSplitter, ThinkTags
from penstock.text.tools import ToolPlan, conversation, plan_tools
from penstock.text.tools_definitions import InvalidTools
from penstock.text.tools_format import shown_ids
from penstock.vision.sources import split_markdown

FINISH = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}
_MEDIA = (wire.AudioPart, wire.VideoPart, wire.FilePart)


@dataclass(frozen=True)
class Prompt:
    """A rendered conversation. opened: the prompt ends inside the model's reasoning. images: of the placeholders."""

    text: str
    ids: list[int]
    plan: ToolPlan | None
    tags: ThinkTags | None
    opened: bool
    images: list[Image]

    def parser(self) -> AnswerParser | None:
        """Takes an answer apart; None where there is nothing but text."""
        if self.plan is None and self.tags is None:
            return None
        splitter = None if self.tags is None else ReasoningSplitter(self.tags, self.opened)
        return AnswerParser(splitter, None if self.plan is None else self.plan.parser())

    def marks(self) -> list[str]:
        """The strings that the parser looks for; some tokenizers have special tokens for them."""
        found = [] if self.plan is None else list(self.plan.format.tokens)
        return found if self.tags is None else [*found, self.tags.open, self.tags.close]


class Voice:
    """One answer: its generation, and what of it is text, reasoning and calls."""

    def __init__(self, index: int, generation: Generation, parser: AnswerParser | None) -> None:
        self.index, self.generation, self.parser = index, generation, parser
        self.reasoning_tokens = 0
        self.ended = False  # all has been said; tokens that came meanwhile are not wanted

    def read(self, tokens: Iterable[TokenEvent]) -> list[Event]:
        """The events that new tokens release. Ends the generation when the parser has all it waits for."""
        if self.ended:
            return []
        if self.parser is None:
            text = "".join([token.piece for token in tokens])
            return [Content(text)] if text else []
        found: list[Event] = []
        for token in tokens:
            thought = self.parser.thinking
            found += self.parser.push(token.piece)
            self.reasoning_tokens += thought or self.parser.thinking
        if self.parser.done:
            self.generation.stop()
        if self.generation.finish_reason:
            self.ended = True
            found += self.parser.finish()
        return found

    @property
    def finish_reason(self) -> str | None:
        """In OpenAI's words, once the answer has ended."""
        reason = self.generation.finish_reason
        if not reason:
            return None
        called = self.parser is not None and self.parser.calls > 0
        return "tool_calls" if called and reason != "length" else FINISH[reason]


@dataclass(frozen=True)
class Turn:
    """A request that is ready to run."""

    prompt: Prompt
    order: Order
    runs: Runs
    voices: list[Voice]

    @property
    def completion_tokens(self) -> int:
        """Of all answers, so far."""
        return sum(voice.generation.generated_tokens for voice in self.voices)

    @property
    def reasoning_tokens(self) -> int:
        """Of those, the tokens of the reasoning and its tags."""
        return sum(voice.reasoning_tokens for voice in self.voices)

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, found in the cache."""
        return self.voices[0].generation.cached_tokens


async def begin(exchange: Exchange, house: House, body: wire.ChatRequest, raw: bytes, arrived: float) -> Turn:
    """Everything that can refuse a request happens here. raw: the body's bytes, for the place of a fault in it."""
    basic = order(exchange, house, body, raw)
    limit = _max_tokens(body)
    asked = wanted(body)
    prompt = await read_prompt(house, body)
    grammar = await _grammar(house, exchange.key_name, prompt, asked)
    top_n = alternatives(body.top_logprobs, "top_logprobs", house)
    full = replace(
        basic,
        max_new_tokens=limit,
        grammar=grammar,
        logprobs=bool(body.logprobs),
        top_n=top_n if body.logprobs else 0,
        keep=shown_ids(house.tokenizer, prompt.marks()),
    )
    request = full.request(house, prompt.ids, prompt.images)
    generations = full.generations(house, request, answers(body, house), arrived)
    voices = [Voice(index, generation, prompt.parser()) for index, generation in enumerate(generations)]
    return Turn(prompt, full, Runs(house, [generations]), voices)


async def read_prompt(house: House, body: wire.ChatRequest) -> Prompt:
    """The conversation as the model's prompt. Raises Refusal 422."""
    template = house.template
    if template is None:
        raise template_error("template not found")
    if not body.messages:
        raise invalid("`messages` cannot be empty", "messages")
    try:
        plan = plan_tools(
            body.tools, body.tool_choice, template, body.tool_prompt, parallel=body.parallel_tool_calls is not False
        )
    except InvalidTools as error:
        raise Refusal(422, f"Tool error: {error.what}", "tool_error", param=error.param) from None
    addresses: list[str] = []
    markdown = house.images.taken
    plain = [_plain(n, message, addresses, markdown) for n, message in enumerate(body.messages)]
    if addresses:
        house.images.check(
            len(addresses), f"messages[{next(n for n, m in enumerate(plain) if _illustrated(m))}].content"
        )
    messages = conversation(plain, plan, template, f"{house.images.inline}\n")
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    generate = body.add_generation_prompt
    if generate is None:
        generate = not body.continue_final_message
    text = await house.render(
        messages,
        tools=None if plan is None else plan.template_tools,
        documents=body.documents,
        add_generation_prompt=generate,
        continue_final_message=body.continue_final_message,
        variables=variables,
    )
    seen = await house.images.prepare(text, addresses)
    # The template prints the special tokens itself.
    special = bool(body.add_special_tokens) if seen.special is None else seen.special
    ids = await house.encode(seen.text, add_special_tokens=special)
    tags = template.think_tags
    return Prompt(seen.text, ids, plan, tags, tags is not None and tags.opened_by(text), seen.images)


def _max_tokens(body: wire.ChatRequest) -> int | None:
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise invalid("give `max_tokens` or `max_completion_tokens`, not both", "max_tokens")
    found = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if found == 0:
        raise invalid("`max_new_tokens` must be strictly positive", "max_tokens")
    return found


async def _grammar(house: House, who: str, prompt: Prompt, asked: tuple[str, GrammarSpec] | None) -> Any:
    """The grammar that the client asked for, or that of a tool call that must come."""
    if prompt.plan is None:
        return None if asked is None else await compiled(house, who, *asked)
    if asked is not None:
        raise Refusal(422, "Tool error: Grammar and tools are mutually exclusive", "tool_error", param=asked[0])
    spec = prompt.plan.grammar(house.tokenizer, prompt.tags, prompt.opened)
    return None if spec is None else await compiled(house, who, "tools", spec)


def _plain(place: int, message: wire.ChatMessage, addresses: list[str], markdown: bool) -> dict[str, Any]:
    """A message as OpenAI sends it, without what is not there.

    addresses: is given those of its images. markdown: a user's text may have some too, in TGI's syntax, as data URLs.
    """
    content = _content(place, message, addresses, markdown and message.role == "user")
    found: dict[str, Any] = {"role": message.role, "content": content}
    for name in ("name", "tool_call_id", "reasoning_content"):
        value = getattr(message, name)
        if value is not None:
            found[name] = value
    if message.tool_calls:
        found["tool_calls"] = [
            {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": _arguments(call)}}
            for call in message.tool_calls
        ]
    return found


def _content(
    place: int, message: wire.ChatMessage, addresses: list[str], markdown: bool
) -> str | list[dict[str, str]] | None:
    content = message.content
    if content is None:
        if not message.tool_calls and not (message.role == "assistant" and message.reasoning_content):
            raise invalid(f"messages[{place}] has no `content`", "messages")
        return None
    if isinstance(content, str):
        return _split(content, addresses) if markdown and "](data:" in content else content
    parts: list[dict[str, str]] = []
    for part in content:
        if isinstance(part, _MEDIA):
            kind = type(part).__struct_config__.tag
            raise unsupported(str(kind), "this server takes text and images", f"messages[{place}].content")
        if isinstance(part, wire.ImagePart):
            if message.role != "user":
                raise invalid(f"messages[{place}]: only a user's message may have images", "messages")
            addresses.append(_address(part, place))
            parts.append({"type": "image"})
            continue
        text = part.text if isinstance(part, wire.TextPart) else part.refusal
        parts += _split(text, addresses) if markdown and "](data:" in text else [{"type": "text", "text": text}]
    return parts


def _split(text: str, addresses: list[str]) -> list[dict[str, str]]:
    """A text with images in TGI's Markdown as parts."""
    (first, *others), found = split_markdown(text, only_data=True)
    parts = [{"type": "text", "text": first}] if first else []
    for address, piece in zip(found, others, strict=True):
        addresses.append(address)
        parts += [{"type": "image"}, {"type": "text", "text": piece}] if piece else [{"type": "image"}]
    return parts


def _illustrated(message: dict[str, Any]) -> bool:
    return isinstance(message["content"], list) and {"type": "image"} in message["content"]


def _address(part: wire.ImagePart, place: int) -> str:
    """Where an image is; some clients send the address itself in place of an object with it."""
    given = part.image_url
    found = given.get("url") if isinstance(given, dict) else given
    if not isinstance(found, str):
        raise invalid(f"messages[{place}].content: `image_url` must have a `url`", "messages")
    return found


def _arguments(call: wire.ToolCall) -> Any:
    function = call.function
    found = function.parameters if function.arguments is None else function.arguments
    return {} if found is None else found
