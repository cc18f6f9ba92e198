"""`penstock farm`: prompts over many workers, each answered exactly once."""

from __future__ import annotations

import click

from penstock.cli.farm_look import cancel, merge, report, status
from penstock.cli.farm_start import resume, run, submit
from penstock.cli.farm_worker import worker


@click.group(short_help="Spread a file of prompts over many workers; each row is answered exactly once.")
def farm() -> None:
    """Spread a file of prompts over many workers.

    A farm is a folder, and every command but `run` and `submit` names that folder. Workers may die, be preempted or be
    started twice at any moment: each row is answered exactly once, and `resume` goes on.

    First steps: `penstock farm run -i prompts.txt -m demo -o out`, `penstock farm submit ... --partitions all
    --workers 8`, `penstock farm status out`, `penstock farm merge out`.
    """


for command in (run, submit, status, resume, cancel, merge, report, worker):
    farm.add_command(command)
