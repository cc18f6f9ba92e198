"""Generated tokens to text with stop strings: the one code for streaming, whole answers, batch and chat."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from penstock.text.detokenizer import Detokenizer
from penstock.text.stops import StopMatcher
from penstock.text.tokenizer import Tokenizer


class TextStream:
    """The text of one generated sequence.

    `push` takes a token and returns the text it releases; `finish` returns the rest. Joined they are `text`:
    special tokens left out, cut at the first stop string. The stop string itself stays when `include_stop`
    (TGI's way) and goes otherwise (OpenAI's way); text that may turn out to be one is then held back. Stop
    strings match special tokens too (`<|im_end|>`), as they are spelt. `keep` are special tokens that
    belong to the text all the same (those that mark tool calls).

    `shown` is the text of the last token with special tokens spelt out and nothing held back: what a token
    event carries. After `finish` it has the rest as well.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        include_stop: bool = True,
        skip_special_tokens: bool = True,
        keep: frozenset[int] = frozenset(),
    ) -> None:
        special = tokenizer.special_ids
        self._tokenizer = tokenizer
        self._hidden = special - keep if skip_special_tokens else frozenset[int]()
        continues = any(i not in special for i in reversed(prompt_ids))
        self._detokenizer = Detokenizer(tokenizer.pieces, continues)
        self._stops = StopMatcher(stop)
        self._include_stop = include_stop
        self._held: deque[tuple[int, str, bool]] = deque()  # (position, text, visible) not yet released
        self._parts: list[str] = []
        self.shown = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete: the request can be ended."""
        return self._stops.end is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that is complete."""
        return self._stops.found

    @property
    def text(self) -> str:
        """All text released so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_id: int) -> str:
        """The text that this token releases, "" if none. After a stop string nothing more comes out."""
        self.shown = ""
        if self.stopped:
            return ""
        if token_id in self._hidden:
            return self._read(self._tokenizer.token_text(token_id), visible=False)
        return self._read(self._detokenizer.push(token_id), visible=True)

    def finish(self) -> str:
        """The rest: characters that never got whole, and text that was held back for nothing."""
        released = "" if self.stopped else self._read(self._detokenizer.flush(), visible=True)
        if not self.stopped:
            released += self._release(self._stops.seen)
        return released

    def _read(self, text: str, visible: bool) -> str:
        position = self._stops.seen
        stopped = self._stops.push(text)
        end = self._stops.end
        if stopped and end is not None:
            text = text[: end - position]
        self.shown += text
        if text:
            self._held.append((position, text, visible))
        if self._include_stop:
            return self._release(self._stops.seen)
        start = self._stops.start
        if start is not None:
            released = self._release(start)
            self._held.clear()
            return released
        return self._release(self._stops.safe)

    def _release(self, upto: int) -> str:
        """Let out the held text before a position."""
        out: list[str] = []
        while self._held and self._held[0][0] < upto:
            position, text, visible = self._held.popleft()
            if position + len(text) > upto:
                cut = upto - position
                self._held.appendleft((upto, text[cut:], visible))
                text = text[:cut]
            if visible:
                out.append(text)
        released = "".join(out)
        if released:
            self._parts.append(released)
        return released
