"""The options of everything that generates for a file of prompts, and what they become: Parameters, RowShape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.cli.options import COUNT, FiniteFloat, Whole, sampling_options, stack
from penstock.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from penstock.batch.parameters import Parameters
    from penstock.batch.rows import RowShape
    from penstock.text.grammar import GrammarSpec

FORMATS = ("auto", "txt", "jsonl", "csv", "tsv", "parquet", "openai")

shape_options = stack(
    click.option(
        "--input-format",
        type=click.Choice(FORMATS),
        default="auto",
        show_default=True,
        help="txt: a prompt a line. jsonl: an object a line. openai: OpenAI's batch file.",
    ),
    click.option("--separator", metavar="TEXT", help="Between the prompts of a text file, such as '\\n\\n' or '---'."),
    click.option("--template", metavar="TEXT", help="Makes prompts of columns: 'Translate: {text}'."),
    click.option("--template-file", metavar="FILE", help="The same from a file."),
    click.option("--column", metavar="NAME", help="Of a table: the prompts.  [default: prompt or text]"),
    click.option("--id-column", metavar="NAME", help="Of a table: the ids.  [default: id, else the row's number]"),
)

generation_options = stack(
    click.option("--max-new-tokens", type=COUNT, default=128, show_default=True, help="Tokens for a row, at most."),
    sampling_options,
    click.option("--min-p", type=FiniteFloat(0, 1), help="Leave out what is less likely than P times the likeliest."),
    click.option("-n", "--samples", "n", type=Whole(1, 1024), help="Texts for a row.  [default: 1]"),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End a row at this text, which stays in it. Repeatable."
    ),
    click.option("--ignore-eos", is_flag=True, help="Go on to --max-new-tokens, whatever the model says."),
    click.option("--chat", is_flag=True, help="Prompts are users' messages, for the model's chat template."),
    click.option("--system", metavar="TEXT", help="What goes before each conversation; asks for --chat."),
    click.option("--json-schema", metavar="FILE", help="A JSON schema that every text must match."),
    click.option("--json-object", is_flag=True, help="Every text must be a JSON object."),
    click.option("--regex", metavar="PATTERN", help="A pattern that every text must match, whole."),
    click.option("--choice", multiple=True, metavar="TEXT", help="Every text must be one of these. Repeatable."),
    click.option("--lark", metavar="FILE", help="A Lark grammar that every text must match."),
)


def parameters_of(options: dict[str, Any]) -> Parameters:
    """What the generation options ask for. Raises UsageError, also for a grammar that cannot be followed."""
    from penstock.batch.parameters import Parameters

    asked = {name: options[name] for name in Parameters.__struct_fields__ if name in options}
    return Parameters(
        **{
            **asked,
            "stop": list(options["stop"]) or None,
            "grammar": _grammar(options),
            "ignore_eos": options["ignore_eos"] or None,
            "chat": options["chat"] or options["system"] is not None or None,
        }
    )


def shape_of(options: dict[str, Any]) -> RowShape:
    """How the rows lie in the input. Raises UsageError."""
    from penstock.batch.rows import RowShape

    template = options["template"]
    if options["template_file"] is not None:
        if template is not None:
            raise UsageError("--template and --template-file are two templates.", hint="Give one.")
        template = _read("--template-file", options["template_file"]).removesuffix("\n")
    return RowShape(options["separator"], template, options["column"], options["id_column"])


def _grammar(options: dict[str, Any]) -> GrammarSpec | None:
    """What every text must match."""
    from penstock.text.grammar import GrammarRefused, GrammarSpec, source_of

    found: list[tuple[str, GrammarSpec]] = []
    if options["json_schema"] is not None:
        text = _read("--json-schema", options["json_schema"])
        found.append((f"--json-schema {options['json_schema']}", GrammarSpec("json_schema", text)))
    if options["json_object"]:
        found.append(("--json-object", GrammarSpec("json_object")))
    if options["regex"] is not None:
        found.append(("--regex", GrammarSpec("regex", options["regex"])))
    if options["choice"]:
        found.append(("--choice", GrammarSpec("choice", list(options["choice"]))))
    if options["lark"] is not None:
        found.append((f"--lark {options['lark']}", GrammarSpec("lark", _read("--lark", options["lark"]))))
    if len(found) > 1:
        raise UsageError(f"{found[0][0]} and {found[1][0]} contradict each other.", hint="Give one grammar.")
    for name, spec in found:
        try:
            source_of(spec)
        except GrammarRefused as refused:
            raise UsageError(f"{name}: {refused.what}") from None
        return spec
    return None


def _read(option: str, name: str) -> str:
    """A small text file that an option names."""
    try:
        return Path(name).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise EnvironmentFault(f"{option} {name} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{option} {name} is not UTF-8 text.") from None
