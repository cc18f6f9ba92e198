"""An answer as the content blocks of /v1/messages, and the events that tell how they grow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from penstock.server.anthropic import wire
from penstock.server.generation import TokenEvent
from penstock.server.openai.turn import Turn
from penstock.server.refusal import Refusal
from penstock.text.answer_events import CallArguments, CallStart, Content, Event, Reasoning

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Narrator:
    """Keeps a Message true while the answer comes; see openai/narration.py."""

    def __init__(self, message: wire.Message, turn: Turn) -> None:
        self.message = message
        self._turn = turn
        self._frames: list[bytes] = []  # of events, encoded when they happen
        self._open: wire.Block | None = None
        self._text: list[str] = []  # of the open block

    def begin(self) -> bytes:
        """The two events before the first token."""
        self._emit("message_start", message=self.message)
        self._emit("ping")
        return self._taken()

    def tell(self, events: Iterable[Event], tokens: list[TokenEvent]) -> bytes:
        """What new tokens brought."""
        for event in events:
            match event:
                case Content(text):
                    if not isinstance(self._open, wire.TextBlock):
                        self._add(wire.TextBlock())
                    self._delta("text_delta", "text", text)
                case Reasoning(text):
                    if not isinstance(self._open, wire.ThinkingBlock):
                        self._add(wire.ThinkingBlock())
                    self._delta("thinking_delta", "thinking", text)
                case CallStart(_, identity, name):
                    self._add(wire.ToolUseBlock(identity, name))
                case CallArguments(_, text):
                    self._delta("input_json_delta", "partial_json", text)
        return self._taken()

    def end(self) -> bytes:
        """The answer is over."""
        self._close()
        message, voice = self.message, self._turn.voices[0]
        finish_reason, stop_string = voice.finish_reason or "stop", voice.generation.stop_string
        message.usage, message.stop_sequence = usage(self._turn), stop_string
        message.stop_reason = STOP_REASONS[finish_reason]
        if stop_string is not None and finish_reason == "stop":
            message.stop_reason = "stop_sequence"
        delta = {"stop_reason": message.stop_reason, "stop_sequence": message.stop_sequence}
        self._emit("message_delta", delta=delta, usage=message.usage)
        self._emit("message_stop")
        return self._taken()

    def fail(self, refusal: Refusal) -> bytes:
        """The answer breaks off."""
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(refusal.anthropic())

    def _add(self, block: wire.Block) -> None:
        self._close()
        self._open = block
        self.message.content.append(block)
        self._emit("content_block_start", index=len(self.message.content) - 1, content_block=block)

    def _delta(self, kind: str, name: str, text: str) -> None:
        self._text.append(text)
        delta = {"type": kind, name: text}
        self._emit("content_block_delta", index=len(self.message.content) - 1, delta=delta)

    def _close(self) -> None:
        block, text = self._open, "".join(self._text)
        if block is None:
            return
        match block:
            case wire.TextBlock():
                block.text = text
            case wire.ThinkingBlock():
                block.thinking = text
            case wire.ToolUseBlock():
                block.input = _object(text)
        self._emit("content_block_stop", index=len(self.message.content) - 1)
        self._open, self._text = None, []

    def _emit(self, kind: str, **fields: Any) -> None:
        event = msgspec.json.encode(wire.MessageEvent(type=kind, **fields))
        self._frames.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), event))

    def _taken(self) -> bytes:
        frames, self._frames = self._frames, []
        return b"".join(frames)


def usage(turn: Turn) -> wire.MessagesUsage:
    """Token counts so far."""
    cached = turn.cached_tokens
    fresh = len(turn.prompt.ids) - cached
    return wire.MessagesUsage(
        input_tokens=fresh,
        cache_read_input_tokens=cached,
        output_tokens=turn.completion_tokens,
        output_tokens_details=wire.OutputDetails(turn.reasoning_tokens),
    )


def _object(text: str) -> msgspec.Raw:
    """The arguments of a call; an empty object where the answer was cut before they were whole."""
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        value = None
    return msgspec.Raw(text.encode()) if isinstance(value, dict) else msgspec.Raw(b"{}")
