"""The `penstock` command: finds the subcommand, and turns every failure into a message and an exit code.

A subcommand's module is imported only when it runs, so `penstock --help` costs nothing but click.
"""

from __future__ import annotations

import difflib
import errno
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import click
from click.core import ParameterSource

from penstock import __version__
from penstock.errors import PenstockError, UsageError

# command: (module, help line). The click command in the module has the name of the command.
COMMANDS = {
    "serve": ("penstock.cli.serve", "Serve a model over HTTP, compatible with TGI and OpenAI clients."),
    "chat": ("penstock.cli.chat", "Talk to a model, here or on a server."),
    "generate": ("penstock.cli.generate", "Generate for a file of prompts; a rerun resumes."),
    "embed": ("penstock.cli.embed", "Hidden states for a file of texts; a rerun resumes."),
    "models": ("penstock.cli.models", "List the catalogue of models by their short names."),
    "convert": ("penstock.cli.convert", "Make safetensors of a model that has only .bin files."),
    "plan": ("penstock.cli.plan", "What a model needs, whether it fits, how fast it will be; sbatch options."),
    "download": ("penstock.cli.download", "Fetch a model where there is internet, verified, for use without."),
    "site": ("penstock.cli.site", "Show the profile of this cluster, or write one from what Slurm says."),
    "release": ("penstock.cli.release", "Build, check and install a release for machines without internet."),
    "farm": ("penstock.cli.farm", "Spread a file of prompts over many workers; each row is answered exactly once."),
    "submit": ("penstock.cli.submit", "Start a server as a Slurm job."),
    "jobs": ("penstock.cli.jobs", "List the servers that run as Slurm jobs."),
    "url": ("penstock.cli.url", "Print the URL of a server that runs as a Slurm job."),
    "logs": ("penstock.cli.logs", "Show what a server in a Slurm job prints."),
    "tunnel": ("penstock.cli.tunnel", "Bring a server in a Slurm job to a port of this machine."),
    "stop": ("penstock.cli.stop", "End a server that runs as a Slurm job."),
    "stage": ("penstock.cli.stage", "Bring a model to the RAM disk or local disk of a job's nodes."),
    "bench": ("penstock.cli.bench", "Measure: the engine, a server under load, other engines."),
    "doctor": ("penstock.cli.doctor", "Check this machine: what works, what does not, and the cure."),
}
INTERRUPTED = 130
MAX_LINES = 6  # of an error message
EPILOG = (
    "MODEL is `demo` (bundled), a folder, a GGUF file, a hub name ORG/NAME[@REVISION], or a name that "
    "`penstock models` lists. Every option can also be set as "
    "PENSTOCK_<OPTION> in the environment, or under [COMMAND] in the file that --config names "
    "(default: ~/.config/penstock/config.toml). Exit codes: 0 ok, 1 failure, 2 usage, 3 environment, 4 model, "
    "5 resources, 6 partial results, 130 interrupted."
)


class LazyGroup(click.Group):
    """A group that knows the names and help lines of its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order people meet them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)
        add_common(command)
        check_config(command, cmd_name, ctx)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands with their lines from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but an unknown command names the nearest known one."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise click.UsageError(f"No such command {args[0][:60]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


def add_common(command: click.Command) -> None:
    """Give every option of a command its PENSTOCK_ variable, and the command `--debug`; of a group, to its commands."""
    if isinstance(command, click.Group):
        for member in command.commands.values():
            add_common(member)
    if any(param.name == "debug" for param in command.params):
        return  # already done: the command was loaded before
    command.params.append(
        click.Option(["--debug"], is_flag=True, expose_value=False, callback=_remember_debug, help="Show tracebacks.")
    )
    for param in command.params:
        if isinstance(param, click.Option) and param.name:
            own = f"PENSTOCK_{param.name.upper()}"
            other = [param.envvar] if isinstance(param.envvar, str) else list(param.envvar or ())
            param.envvar = [own, *(name for name in other if name != own)]


def check_config(command: click.Command, name: str, ctx: click.Context) -> None:
    """A misspelt option in the configuration file must not be ignored in silence."""
    _check_table((ctx.default_map or {}).get(name, {}), command, name, ctx)


def _check_table(table: Any, command: click.Command, name: str, ctx: click.Context) -> None:
    """One table of it; the commands of a group have tables within the group's."""
    members = command.commands if isinstance(command, click.Group) else {}
    known = [param.name for param in command.params if isinstance(param, click.Option) and param.name]
    known += command.list_commands(ctx) if isinstance(command, click.Group) else []
    for key, value in table.items():
        if key in members and isinstance(value, dict):
            _check_table(value, members[key], f"{name} {key}", ctx)
        elif key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UsageError(
                f"The configuration sets {key!r} under [{name}], which is no option of `penstock {name}`.",
                f"File: {ctx.meta['penstock.config']}" + (f". Did you mean {near[0]!r}?" if near else ""),
                f"`penstock {name} --help` lists the options.",
            )


def _remember_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().meta["penstock.debug"] = True


def _load_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Read the TOML file below the flags and the environment; click calls this before any command is parsed."""
    from penstock.cli.config import default_config_file, read_config_file

    ctx.meta["penstock.config"] = value or default_config_file()
    ctx.default_map = read_config_file(value, list(COMMANDS))


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="penstock", message="%(prog)s %(version)s")
@click.option(
    "--config",
    metavar="FILE",
    envvar="PENSTOCK_CONFIG",
    expose_value=False,
    callback=_load_config,
    help="TOML file with options, one table a command.",
)
@click.option(
    "--debug",
    is_flag=True,
    envvar="PENSTOCK_DEBUG",
    expose_value=False,
    callback=_remember_debug,
    help="Show tracebacks.",
)
def penstock() -> None:
    """Penstock turns a model name into text on any machine.

    First steps: `penstock chat demo`, `penstock serve demo`, `penstock doctor`.
    """


def main(args: Sequence[str] | None = None) -> NoReturn:
    """The console script: run, print what went wrong for people, exit with the documented code."""
    run_command(penstock, args, "penstock")


def run_command(command: click.Command, args: Sequence[str] | None, name: str) -> NoReturn:
    """Run a click command as a whole program. Every console script of Penstock ends here."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character gets an escape, not a crash
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if args is None else args)
    meta: dict[str, Any] = {}
    try:
        context = command.make_context(name, arguments)
        meta = context.meta
        with context:
            code = command.invoke(context)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        click.echo(_origin(error), err=True, nl=False)
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # Python's own way out takes the signal again if it hit inside an exec()
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            _drop_stdout()
            sys.exit(1)
        if meta.get("penstock.debug") or "--debug" in arguments[:1]:
            traceback.print_exc()
        sys.exit(report(error))


def _origin(error: click.ClickException) -> str:
    """Where a refused value came from, if not from the command line."""
    ctx = getattr(error, "ctx", None)
    param = getattr(error, "param", None)
    if not isinstance(ctx, click.Context) or not isinstance(param, click.Option) or param.name is None:
        return ""
    source = ctx.get_parameter_source(param.name)
    if source is ParameterSource.DEFAULT_MAP:
        return f"It is set in {ctx.meta['penstock.config']}.\n"
    if source is ParameterSource.ENVIRONMENT:
        names = [param.envvar] if isinstance(param.envvar, str) else param.envvar or ()
        return f"It is set in the environment: {' or '.join(n for n in names if n in os.environ)}.\n"
    return ""


def report(error: Exception) -> int:
    """Print an error for people on stderr, in at most six lines; returns its exit code."""
    if isinstance(error, PenstockError):
        lines = str(error).splitlines()
        code = error.exit_code
    else:
        lines = [
            f"Penstock failed in a way that it does not know: {type(error).__name__}: {error}".splitlines()[0],
            "This is probably a bug in Penstock.",
            "Run it again as `penstock --debug ...` and report what it prints.",
        ]
        code = 1
    head, *rest = lines or [type(error).__name__]
    click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
    for line in [head, *(f"  {line}" for line in rest)][:MAX_LINES]:
        # names of files and models come from strangers: nothing in them may drive the terminal
        click.echo("".join(c if c.isprintable() else repr(c)[1:-1] for c in line), err=True)
    return code


def _drop_stdout() -> None:
    """The reader of our stdout is gone: keep the interpreter from complaining when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
