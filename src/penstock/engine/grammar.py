"""Grammars in the engine: one cursor a sequence, its mask computed beside the forward pass.

Two lanes, each a thread, move cursors on: one for most, one for those that once took long, so that a costly grammar
makes nobody wait but its own sequence. A mask that takes less than its hand-over is computed on the spot. Where the
grammar allows only one text, its tokens are not chosen but taken, and computed together in one run. What is made from a
stranger's grammar was tried out in the forge before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from penstock.devices.threads import be_polite
from penstock.engine.matcher import Vocabulary
from penstock.errors import InvalidRequest
from penstock.kernels.mask import Mask

log = logging.getLogger("penstock.engine")

SLOW_SECONDS = 0.005  # of a processor; a cursor that once took longer goes to the slow lane, for good
_QUICK_SECONDS = 0.0001  # a move that took less is made on the spot the next time ...
_HELD_UP = 0.001  # ... unless one of the cursor's moves once took this long, ...
_PARDONS = 3  # ... or as many did by the wall clock, which may be a neighbour's fault
_WARY = 64  # choices without a guess, at most, after several that were wrong
_KEPT, _KEPT_CHARACTERS = 64, 2**21  # fresh matchers kept for the next request with the same grammar
_MAKERS = 2
_POLITE = 10  # niceness of what is not waited for by everybody


class Cursor:
    """Where one sequence is in its grammar, and what it allows next.

    forced: the tokens that must come next, one way to spell the only text that may; valid once `ready`.
    ends: the tokens that end a text; they are allowed where the grammar may end.
    withheld: the same, in a list.
    error: why the grammar failed; it then allows nothing.
    """

    def __init__(self, matcher: Any, width: int, ends: frozenset[int]) -> None:
        self.ends, self.withheld = ends, list(ends)
        self.forced: list[int] = []
        self.error: str | None = None
        self.slow = False
        self.quick = False
        self._misses = 0  # guesses in a row that were wrong
        self._wary = 0  # choices to go before the next one
        self._mask = Mask(width)
        self._masked = False  # the mask is that of this place
        self._taken: int | None = None  # a token that the matcher has consumed before it was chosen
        self._pardons = _PARDONS
        self._matcher = matcher
        self._moved = False
        self._batch = threading.Event()  # set when those are done that a lane moves together with this one
        self.move(None)

    def leave(self, batch: threading.Event) -> None:
        """A lane will move it on, as one of a batch; until then it is not ready."""
        self._moved, self._batch = False, batch

    def ready(self, seconds: float = 0.0) -> bool:
        """Whether the last move is done, waiting for so long."""
        if not self._moved and seconds > 0:
            self._batch.wait(seconds)
        return self._moved

    def guesses(self) -> bool:
        """Whether to `take` the likeliest token of all rather than to make a mask: where the last guess was good."""
        if self._wary:
            self._wary -= 1
            return False
        return self.quick and not self._masked and self.error is None

    def take(self, token_id: int) -> bool:
        """Consume a token if it may come, and what is forced behind it."""
        self._do(self._try, token_id)
        self._misses = 0 if self._taken is not None else self._misses + 1
        self._wary = min(2**self._misses - 1, _WARY)
        return self._misses == 0

    def move(self, token_id: int | None) -> None:
        """Consume a token, if there is one that was not taken, and what is forced behind it. The mask of a quick cursor
        is left until somebody asks, if the next token will be guessed."""
        self._masked = False
        if token_id is None or token_id != self._taken:
            self._do(self._advance, token_id)
        elif not self.quick:
            self._do(self._make_mask, None)
        self._taken, self._moved = None, True

    def mask(self) -> Mask:
        """What may come after the forced tokens."""
        if not self._masked:
            self._do(self._make_mask, None)
        return self._mask

    def _try(self, token_id: int | None) -> None:
        if self._matcher.try_consume_tokens([token_id]) == 1:
            self._taken = token_id
            self._follow()
        else:
            self._taken = None

    def _advance(self, token_id: int | None) -> None:
        if token_id is not None:
            self._matcher.consume_token(token_id)
        self._follow()
        if self._wary or not self.quick:
            self._make_mask(None)

    def _follow(self) -> None:
        """Consume what is forced here."""
        self.forced = self._matcher.compute_ff_tokens()
        if self.forced:
            self._matcher.consume_tokens(self.forced)

    def _make_mask(self, _token_id: int | None) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._mask.address, self._mask.bits.nbytes)
        self._masked = True

    def _do(self, work: Callable[[int | None], None], token_id: int | None) -> None:
        """Run the library, keep its failures, and note how long it took: by the wall clock while it is quick, which
        costs a tenth of the thread's own; that one then tells an expensive grammar from a busy machine."""
        clock = time.perf_counter if self.quick else time.thread_time
        began = clock()
        try:
            work(token_id)
            if self._matcher.is_error():
                self.error = "the grammar is too complex to follow"
                log.info("a grammar failed: %s", self._matcher.stop_reason())
        except BaseException as error:  # a panic of the library is no Exception
            self.error = "the grammar failed"
            log.warning("a grammar failed: %s", type(error).__name__)
        if self.error is not None:
            self._mask.bits[:] = 0
            self._masked, self._taken, self.forced = True, None, []
        took = clock() - began
        if took > _HELD_UP:
            self._pardons -= 1 if self.quick else _PARDONS
            self.slow |= not self.quick and took > SLOW_SECONDS
        self.quick = self._pardons > 0 and took < _QUICK_SECONDS


@dataclass(frozen=True)
class _Batch:
    """What one step gives to a lane: one hand-over for all."""

    moves: list[tuple[Cursor, int]]
    done: threading.Event


class Lanes:
    """The threads that move cursors on."""

    def __init__(self) -> None:
        self._quick: SimpleQueue[_Batch] = SimpleQueue()
        self._slow: SimpleQueue[_Batch] = SimpleQueue()
        for queue, niceness in ((self._quick, 0), (self._slow, _POLITE)):
            threading.Thread(target=_run, args=(queue, niceness), name="grammar", daemon=True).start()

    def move(self, moves: list[tuple[Cursor, int]]) -> None:
        """Let each cursor take its token. Its next mask is computed in the meantime, or at once where that is quick."""
        beside = []
        for cursor, token_id in moves:
            if cursor.quick:
                cursor.move(token_id)
            else:
                beside.append((cursor, token_id))
        if not beside:
            return
        for queue, slow in ((self._quick, False), (self._slow, True)):
            batch = _Batch([move for move in beside if move[0].slow == slow], threading.Event())
            if batch.moves:
                for cursor, _token in batch.moves:
                    cursor.leave(batch.done)
                queue.put(batch)


class Grammars:
    """Makes cursors. Nothing is loaded before the first grammar comes."""

    def __init__(self, folder: Path, width: int, eos_ids: Sequence[int], fresh: bool = False) -> None:
        """folder: of the model, for its tokenizer. width: of its output. fresh: see Vocabulary."""
        self._arguments = (folder, width, eos_ids, fresh)
        self._vocabulary: Vocabulary | None = None
        self._lanes: Lanes | None = None
        self._lock = threading.Lock()
        self._fresh: OrderedDict[str, Any] = OrderedDict()  # least recently used first
        self._makers: ThreadPoolExecutor | None = None

    def begin(self, source: str) -> Future[Cursor]:
        """A cursor at the start of a grammar; its Future may raise InvalidRequest."""
        if self._makers is None:
            self._makers = ThreadPoolExecutor(_MAKERS, "grammar-maker", initializer=be_polite, initargs=(_POLITE,))
        return self._makers.submit(self._make, source)

    def move(self, moves: list[tuple[Cursor, int]]) -> None:
        """Let each cursor take its token; the next masks are computed in the meantime."""
        if moves and self._lanes is not None:
            self._lanes.move(moves)

    def _make(self, source: str) -> Cursor:
        try:
            with self._lock:
                vocabulary = self._vocabulary = self._vocabulary or Vocabulary(*self._arguments)
                self._lanes = self._lanes or Lanes()
                matcher = self._copy(source)
            if matcher is None:
                fresh = vocabulary.matcher(source)
                with self._lock:
                    self._keep(source, fresh)
                    matcher = fresh.deep_copy()
            return Cursor(matcher, vocabulary.width, vocabulary.ends)
        except InvalidRequest:
            raise
        except BaseException as error:  # a panic of the library is no Exception, and would end the thread
            log.warning("a grammar could not be made: %s", type(error).__name__)
            raise InvalidRequest("grammar is not valid: it cannot be made") from None

    def _copy(self, source: str) -> Any:
        """A copy of a kept matcher, or None."""
        fresh = self._fresh.get(source)
        if fresh is None:
            return None
        self._fresh.move_to_end(source)
        return fresh.deep_copy()

    def _keep(self, source: str, fresh: Any) -> None:
        self._fresh[source] = fresh
        while len(self._fresh) > _KEPT or sum(map(len, self._fresh)) > _KEPT_CHARACTERS:
            self._fresh.popitem(last=False)


def _run(queue: SimpleQueue[_Batch], niceness: int) -> None:
    be_polite(niceness)
    while True:
        batch = queue.get()
        for cursor, token_id in batch.moves:
            cursor.move(token_id)
        batch.done.set()
        del batch, cursor  # they keep the matcher of a sequence that may have ended
