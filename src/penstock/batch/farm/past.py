"""What the earlier lives left of a shard: rows that are done, and rows on which workers died."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.batch.farm.journal import AnyEvent, Begin, End, RowDone, Start

SET_ASIDE = "set aside: "
SILENT_DEATHS = 3  # deaths without a cause (kill -9, a lost node) that weigh as much as one crash


@dataclass
class Past:
    """Rows are numbers in the shard. suspects run alone; aside: not run again, with the reason."""

    done: set[int] = field(default_factory=set)
    suspects: set[int] = field(default_factory=set)
    aside: dict[int, str] = field(default_factory=dict)


def past_of(shard: int, lives: Iterable[Iterable[AnyEvent]]) -> Past:
    """Read the journals of all lives that had the shard, the first one first.

    A row is a suspect when a worker crashed with it in the engine: perhaps any of the others was to blame. It is set
    aside when a worker then crashed with it alone. A death without a cause may have come from outside, so it takes
    three of them for either step.
    """
    past = Past()
    crashed: Counter[int] = Counter()
    crashed_alone: Counter[int] = Counter()
    silent: Counter[int] = Counter()
    silent_alone: Counter[int] = Counter()
    cause: dict[int, str] = {}
    for events in lives:
        running: dict[int, bool] = {}
        end: End | None = None
        begun = False
        for event in events:
            if isinstance(event, Begin):
                begun = True
            elif isinstance(event, Start) and event.shard == shard:
                running |= dict.fromkeys(event.rows, event.alone)
            elif isinstance(event, RowDone) and event.shard == shard:
                running.pop(event.row, None)
                past.done.add(event.row)
            elif isinstance(event, End):
                end = event
        if not begun or (end is not None and end.reason not in ("crashed", "killed")):
            continue
        for row, alone in running.items():
            if end is not None and end.reason == "crashed":
                (crashed_alone if alone else crashed)[row] += 1
            else:
                (silent_alone if alone else silent)[row] += 1
            cause[row] = end.detail if end is not None else "its worker vanished"
    for row in cause.keys() - past.done:
        if crashed_alone[row] or silent_alone[row] >= SILENT_DEATHS:
            deaths = crashed[row] + crashed_alone[row] + silent[row] + silent_alone[row]
            past.aside[row] = f"{SET_ASIDE}the worker died {deaths} times on this row ({cause[row]})"
        elif crashed[row] or silent[row] >= SILENT_DEATHS:
            past.suspects.add(row)
    return past
