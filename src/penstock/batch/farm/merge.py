"""From journals to one output: each row of the input exactly once, in the input's order."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from penstock.batch.farm.answers import RESULT_HEAD, Audit, Finder, answer_lines
from penstock.batch.farm.spool import Spool
from penstock.batch.lines import sync_folder
from penstock.errors import EnvironmentFault, PartialResults


def merge(spool: Spool, output: Path, partial: bool = False) -> Audit:
    """Write every answer to `output`, in the order of the input: whole or not at all.

    Raises PartialResults when rows are open and `partial` is not set, EnvironmentFault when the file cannot be
    written or the spool is damaged.
    """
    finder = Finder(spool)
    finder.find()
    found = finder.audit
    if found.lost or found.foreign:
        raise EnvironmentFault(
            f"The farm is damaged: {found.lost:,} answers of completed shards are not there, {found.foreign:,} are "
            "of rows that it does not have.",
            "",
            f"`penstock farm merge {spool.folder} --check` says more.",
        )
    if found.open and not partial:
        raise PartialResults(
            f"{found.open:,} of {found.rows:,} rows are not answered yet.",
            "",
            f"`penstock farm resume {spool.folder}` goes on with them; --partial merges what is there.",
        )
    part = output.with_name(f".{output.name}-{secrets.token_hex(4)}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            for line in answer_lines(spool, finder.answers):
                if line is not None:
                    file.write(line + b"\n")
                    head = RESULT_HEAD.decode(line)
                    found.failed += head.error is not None
                    found.aside += head.aside
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, output)
        sync_folder(output.parent)
    except OSError as error:
        raise EnvironmentFault(f"{output} cannot be written: {error.strerror}.", "", "Free some space.") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return found
