"""The order in which what prompts share is computed once."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.batch.order import WORTH, share_order

Ids = list[int]
pieces = st.sampled_from([[1] * 20, [2] * 33, [3, 1] * 16, [4], list(range(40))])
prompts = st.lists(
    st.lists(pieces, min_size=1, max_size=5).map(lambda parts: [i for part in parts for i in part]), max_size=12
)


def common(a: Ids, b: Ids) -> int:
    for n, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return n
    return min(len(a), len(b))


@settings(max_examples=300, deadline=None)
@given(prompts)
def test_each_waits_for_the_first_that_shares_most(given: list[Ids]) -> None:
    plan = share_order(given)
    assert sorted(index for index, _ in plan) == list(range(len(given)))
    for place, (index, leader) in enumerate(plan):
        before = [other for other, _ in plan[:place]]
        shared = [common(given[index], given[other]) for other in before]
        best = max(shared, default=0)
        if best < WORTH:
            assert leader is None
        else:
            assert leader == before[shared.index(best)]


def test_odd_ids_do_no_harm() -> None:
    assert [index for index, _ in share_order([[-5, 2**40], [], [2**32]])] == [1, 0, 2]
