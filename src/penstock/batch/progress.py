"""A progress bar for programs and notebooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(total: int, what: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """Counts items, of `total`, and tokens a second: call what it gives with (items, tokens) that are done."""
    if not shown:
        yield lambda items, tokens: None
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without widgets a notebook gets the bar as text, which is fine
        from tqdm.auto import tqdm
    with tqdm(total=total, desc=what, dynamic_ncols=True) as found:
        tokens_done = 0

        def advance(items: int, tokens: int) -> None:
            nonlocal tokens_done
            tokens_done += tokens
            found.update(items)
            seconds = found.format_dict["elapsed"]
            if tokens_done and seconds:
                found.set_postfix_str(f"{tokens_done / seconds:,.0f} tokens/s", refresh=False)

        yield advance
