"""`penstock site`: the profile of this cluster, shown or written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from penstock.errors import EnvironmentFault, UsageError


@click.group(short_help="Show the profile of this cluster, or write one from what Slurm says.")
def site() -> None:
    """The site profile: partitions, cards, scratch, modules, internet, ports. Every command for clusters reads it.

    Order: --site, $PENSTOCK_SITE, ~/.config/penstock/site.toml, /etc/penstock/site.toml, a shipped profile that knows
    this machine, else `generic`.
    """


@site.command()
@click.argument("name", required=False)
@click.option("--list", "as_list", is_flag=True, help="The names of the shipped profiles.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show(name: str | None, as_list: bool, as_json: bool) -> None:
    """Print a profile: the one in use, or NAME (a shipped one, or a file). The output is a valid profile."""
    import msgspec

    from penstock.plan.site import load_site, shipped
    from penstock.plan.site_detect import to_toml

    if as_list:
        click.echo(json.dumps(shipped()) if as_json else "\n".join(shipped()))
        return
    found = load_site(name)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    click.echo(f"from {found.file}", err=True)
    click.echo(to_toml(found), nl=False)


@site.command()
@click.option("--output", "-o", metavar="FILE", help="Where to; `-` is stdout.  [default: the user's profile]")
@click.option("--force", is_flag=True, help="Replace the file when it is there.")
@click.option("--offline", is_flag=True, help="Do not try whether this machine reaches the hub.")
@click.option("--json", "as_json", is_flag=True, help="As JSON on stdout; nothing is written.")
def detect(output: str | None, force: bool, offline: bool, as_json: bool) -> None:
    """Write a profile from sinfo and scontrol. Run it on a login node, then correct what Slurm does not know:
    modules, scratch, internet of compute nodes, the size of cards whose name does not tell it."""
    import msgspec

    from penstock.plan.site import user_file
    from penstock.plan.site_detect import detect as ask_slurm
    from penstock.plan.site_detect import to_toml

    found = ask_slurm(check_internet=not offline)
    if as_json:
        click.echo(msgspec.json.encode(found).decode())
        return
    text = to_toml(found)
    if output == "-":
        click.echo(text, nl=False)
        return
    file = Path(output).expanduser() if output else user_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w" if force else "x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(f"{file} is there already.", "", "Give --force to replace it, or another --output.") from None
    except OSError as error:
        raise EnvironmentFault(f"{file} cannot be written: {os.strerror(error.errno or 0)}.") from None
    unknown = sorted({kind.gres or "without a type" for kind in found.nodes.values() if kind.gpus and not kind.gpu})
    click.echo(
        f"{file}: {len(found.partitions)} partitions, {len(found.nodes)} kinds of nodes"
        + (f"; cards of unknown kind: {', '.join(unknown)} (set `gpu`)" if unknown else ""),
        err=True,
    )
