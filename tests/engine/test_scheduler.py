"""The scheduler and the block pool under any order of adds, aborts and steps: blocks add up, everyone finishes."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from penstock.engine.block_pool import BlockPool, block_key, root_key
from penstock.engine.request import EngineRequest
from penstock.engine.scheduler import Scheduler
from penstock.engine.sequence import Sequence

BLOCKS, BLOCK = 12, 4
LONGEST = BLOCKS * BLOCK


class Machine(RuleBasedStateMachine):
    """Steps are played without a model: each run is marked computed, each run that reaches the end gains a token."""

    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(BLOCKS, BLOCK)
        self.scheduler = Scheduler(self.pool, budget=9, max_running=4, prefix_caching=True)
        self.sequences: dict[int, Sequence] = {}
        self.written: dict[int, list[int]] = {}  # what the blocks hold, slot by slot
        self.count = 0

    @rule(
        target=live,
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=30),
        new=st.integers(1, 18),
        priority=st.integers(0, 1),
        salt=st.sampled_from([b"", b"other"]),
    )
    def add(self, prompt: list[int], new: int, priority: int, salt: bytes) -> int:
        self.count += 1
        request = EngineRequest(self.count, prompt, new, priority=priority, salt=salt)
        sequence = Sequence.of(request, self.count, b"nonce", None)
        self.sequences[self.count] = sequence
        self.scheduler.add(sequence)
        return self.count

    @rule(number=consumes(live))
    def abort(self, number: int) -> None:
        sequence = self.sequences.pop(number, None)
        if sequence is not None:
            self.scheduler.remove(sequence)

    @rule(steps=st.integers(1, 6))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            runs = self.scheduler.next()
            assert bool(runs) == bool(self.sequences)
            assert sum(run.length for run in runs) <= 9
            assert len({run.sequence.id for run in runs}) == len(runs) <= 4
            for run in runs:
                s = run.sequence
                for p in range(s.computed + run.length):
                    slot = self.written.setdefault(s.blocks[p // BLOCK], [-1] * BLOCK)
                    if p >= s.computed:
                        slot[p % BLOCK] = s.ids[p]
                    # whatever a run reads, its own or shared, was written for these very tokens
                    assert slot[p % BLOCK] == s.ids[p]
                ends = run.reaches_end
                s.computed += run.length
                s.publish(self.pool)
                if ends:
                    s.ids.append(s.ids[-1])
                    if s.generated == s.request.max_new_tokens:
                        del self.sequences[s.id]
                        self.scheduler.remove(s)

    @invariant()
    def blocks_add_up(self) -> None:
        free, cached, used = self.pool.counts()
        assert free + cached + used == BLOCKS
        held = {block for s in self.sequences.values() for block in s.blocks}
        assert used == len(held)

    def teardown(self) -> None:
        while self.sequences:
            self.step(1)
        assert self.pool.counts()[2] == 0


Machine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestScheduler = Machine.TestCase


def test_keys_tell_salts_and_prefixes_apart() -> None:
    assert root_key(b"a", b"b") != root_key(b"ab", b"")
    mine, theirs = root_key(b"nonce", b"me"), root_key(b"nonce", b"you")
    assert block_key(mine, [1, 2]) != block_key(theirs, [1, 2])
    assert block_key(mine, [1, 2]) != block_key(mine, [2, 1])
    assert block_key(block_key(mine, [1]), [2]) == block_key(block_key(mine, [1]), [2])


def test_other_salts_do_not_share() -> None:
    pool = BlockPool(8, 2)
    scheduler = Scheduler(pool, 64, 8, prefix_caching=True)

    def computed_at_start(number: int, salt: bytes) -> int:
        sequence = Sequence.of(EngineRequest(number, [5] * 7, 1, salt=salt), number, b"n", None)
        scheduler.add(sequence)
        (run,) = scheduler.next()
        start = sequence.computed
        sequence.computed += run.length
        sequence.publish(pool)
        scheduler.remove(sequence)
        return start

    assert computed_at_start(1, b"me") == 0
    assert computed_at_start(2, b"you") == 0
    assert computed_at_start(3, b"me") == 6


def test_oldest_first_and_priority_before_age() -> None:
    scheduler = Scheduler(BlockPool(64, 4), budget=64, max_running=2, prefix_caching=False)
    for number, priority in ((1, 0), (2, 0), (3, -1)):
        request = EngineRequest(number, [1, 2, 3], 4, priority=priority)
        scheduler.add(Sequence.of(request, number, b"", None))
    assert [run.sequence.id for run in scheduler.next()] == [3, 1]
