"""An answer as the items of /v1/responses, and the events that tell how they grow."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

import msgspec

from penstock.server.exchange import DONE
from penstock.server.generation import TokenEvent
from penstock.server.openai import responses_wire as wire
from penstock.server.openai.answers import ChosenLogprob
from penstock.server.openai.logprobs import of_chat
from penstock.server.openai.turn import Turn
from penstock.server.refusal import Refusal
from penstock.text.answer_events import CallArguments, CallStart, Content, Event, Reasoning
from penstock.text.tokenizer import Tokenizer


class Narrator:
    """Keeps a Response true while the answer comes; see narration.py."""

    def __init__(self, response: wire.Response, turn: Turn, tokenizer: Tokenizer) -> None:
        self.response = response
        self._turn, self._tokenizer = turn, tokenizer
        self._frames: list[bytes] = []  # of events, encoded when they happen
        self._number = 0
        self._open: wire.Item | None = None
        self._text: list[str] = []  # of the open item

    def begin(self) -> bytes:
        """The two events before the first token."""
        self._emit("response.created", response=self.response)
        self._emit("response.in_progress", response=self.response)
        return self._taken()

    def tell(self, events: Iterable[Event], tokens: list[TokenEvent]) -> bytes:
        """What new tokens brought."""
        order, logprobs = self._turn.order, []
        if order.logprobs:
            logprobs = of_chat(self._tokenizer, tokens, order.top_n).content
        for event in events:
            match event:
                case Content(text):
                    self._say(text, logprobs)
                    logprobs = []
                case Reasoning(text):
                    self._think(text)
                case CallStart():
                    self._start_call(event)
                case CallArguments(_, text):
                    self._text.append(text)
                    self._delta("response.function_call_arguments.delta", delta=text)
        return self._taken()

    def end(self) -> bytes:
        """The answer is over: the open item is closed, the last event has the whole response."""
        self.response.usage = _usage(self._turn)
        if self._turn.voices[0].finish_reason == "length":
            self.response.incomplete_details = {"reason": "max_output_tokens"}
            return self._end("incomplete")
        return self._end("completed")

    def fail(self, refusal: Refusal) -> bytes:
        """The answer breaks off."""
        self.response.error = {"code": "server_error", "message": refusal.message}
        return self._end("failed")

    def _end(self, status: wire.Status) -> bytes:
        self._close("completed" if status == "completed" else "incomplete")
        self.response.status = status
        self._emit(f"response.{status}", response=self.response)
        return self._taken() + DONE

    def _say(self, text: str, logprobs: list[ChosenLogprob]) -> None:
        item = self._open
        if not isinstance(item, wire.MessageItem):
            self._add(wire.MessageItem(id=_identity("msg")))
            self._delta("response.content_part.added", content_index=0, part=wire.OutputText())
            item = self._open
        if isinstance(item, wire.MessageItem) and logprobs:
            part = item.content[0] if item.content else wire.OutputText(logprobs=[])
            part.logprobs = [*part.logprobs, *logprobs]
            item.content = [part]
        self._text.append(text)
        self._delta("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)

    def _think(self, text: str) -> None:
        if not isinstance(self._open, wire.ReasoningItem):
            self._add(wire.ReasoningItem(id=_identity("rs")))
            self._delta("response.content_part.added", content_index=0, part=wire.ReasoningText())
        self._text.append(text)
        self._delta("response.reasoning_text.delta", content_index=0, delta=text)

    def _start_call(self, event: CallStart) -> None:
        self._add(wire.CallItem(id=_identity("fc"), call_id=event.id, name=event.name))

    def _add(self, item: wire.Item) -> None:
        self._close("completed")
        self._open = item
        self.response.output.append(item)
        self._emit("response.output_item.added", output_index=len(self.response.output) - 1, item=item)

    def _close(self, status: wire.Status) -> None:
        item, text = self._open, "".join(self._text)
        if item is None:
            return
        item.status = status
        match item:
            case wire.MessageItem():
                part = item.content[0] if item.content else wire.OutputText()
                part.text, item.content = text, [part]
                self._delta("response.output_text.done", content_index=0, text=text, logprobs=part.logprobs)
                self._delta("response.content_part.done", content_index=0, part=part)
            case wire.ReasoningItem():
                thought = wire.ReasoningText(text=text)
                item.content = [thought]
                self._delta("response.reasoning_text.done", content_index=0, text=text)
                self._delta("response.content_part.done", content_index=0, part=thought)
            case wire.CallItem():
                item.arguments = text
                self._delta("response.function_call_arguments.done", name=item.name, arguments=text)
        self._emit("response.output_item.done", output_index=len(self.response.output) - 1, item=item)
        self._open, self._text = None, []

    def _delta(self, kind: str, **fields: Any) -> None:
        """An event about the open item."""
        if self._open is not None:
            self._emit(kind, item_id=self._open.id, output_index=len(self.response.output) - 1, **fields)

    def _emit(self, kind: str, **fields: Any) -> None:
        event = wire.ResponseEvent(type=kind, sequence_number=self._number, **fields)
        self._frames.append(b"data: %b\n\n" % msgspec.json.encode(event))
        self._number += 1

    def _taken(self) -> bytes:
        frames, self._frames = self._frames, []
        return b"".join(frames)


def _usage(turn: Turn) -> wire.ResponseUsage:
    prompt, completion = len(turn.prompt.ids), turn.completion_tokens
    cached, thought = wire.InputDetails(turn.cached_tokens), wire.OutputDetails(turn.reasoning_tokens)
    return wire.ResponseUsage(prompt, cached, completion, thought, prompt + completion)


def _identity(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"
