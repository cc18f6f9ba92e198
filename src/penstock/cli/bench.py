"""`penstock bench`: measure the engine, a server, or Penstock beside other engines."""

from __future__ import annotations

from importlib import import_module

import click

# subcommand: (module, help line). The click command in the module has the name of the subcommand.
SUBCOMMANDS = {
    "static": ("penstock.cli.bench_static", "The engine alone, as text-generation-benchmark does."),
    "load": ("penstock.cli.bench_load", "A server under load, over HTTP."),
    "compare": ("penstock.cli.bench_compare", "Penstock beside llama.cpp, OpenVINO and others, in turn."),
}


class _Subcommands(click.Group):
    """A group that knows the names and help lines of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SUBCOMMANDS:
            return None
        from penstock.cli.main import add_common, check_config

        command: click.Command = getattr(import_module(SUBCOMMANDS[cmd_name][0]), cmd_name)
        add_common(command)
        check_config(command, cmd_name, ctx)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in SUBCOMMANDS.items()])


@click.command(cls=_Subcommands, short_help="Measure: the engine, a server under load, other engines.")
def bench() -> None:
    """Measure tokens per second, and what share of the machine's limits they are."""
