"""The options of `penstock bench load`: the server, the shape of the load, the prompts, what is told at the end."""

from __future__ import annotations

import click

from penstock.cli.options import COUNT, SEED, FiniteFloat, Whole, stack
from penstock.cli.report import report_option

MILLISECONDS = FiniteFloat(0, 1e9, above_low=True)

target_options = stack(
    click.option("--url", metavar="URL", help="A running server, TGI's or OpenAI's API."),
    click.option("--uds", metavar="PATH", help="The unix socket of a running server."),
    click.option("--api-key-file", metavar="FILE", help="Its key.  [default: found, for a server of yours here]"),
    click.option(
        "--api",
        type=click.Choice(["auto", "tgi", "completions", "chat"]),
        default="auto",
        show_default=True,
        help="/generate_stream, /v1/completions or /v1/chat/completions.",
    ),
    click.option("--model", "model_name", metavar="NAME", help="Name to ask for.  [default: the server's first]"),
)

shape_options = stack(
    click.option(
        "-c", "--concurrency", type=COUNT, multiple=True, help="Closed loop: streams at once. Repeatable.  [default: 1]"
    ),
    click.option(
        "--rate", type=FiniteFloat(0, 1e6, above_low=True), multiple=True, help="Open loop: requests/s. Repeatable."
    ),
    click.option(
        "--arrivals",
        type=click.Choice(["poisson", "constant"]),
        default="poisson",
        show_default=True,
        help="Of --rate.",
    ),
    click.option(
        "--sweep", is_flag=True, help="1, 2, 4 ... streams up to --concurrency (64), while output still grows."
    ),
    click.option("-n", "--requests", type=COUNT, help="Of each level.  [default: 4 a stream or 10 s, at least 20]"),
    click.option("--duration", type=FiniteFloat(0, 86400, above_low=True), help="Seconds of each level, instead."),
    click.option(
        "--cancel", type=FiniteFloat(0, 1), default=0.0, show_default=True, help="Share that hangs up midway."
    ),
    click.option(
        "--timeout", type=FiniteFloat(0, 86400, above_low=True), default=600.0, show_default=True, help="Seconds."
    ),
    click.option("--seed", type=SEED, default=0, show_default=True, help="Of prompts, arrivals and cancellations."),
)

prompt_options = stack(
    click.option("--prompt-tokens", type=COUNT, default=128, show_default=True, help="Of a synthetic prompt."),
    click.option("--output-tokens", type=COUNT, default=64, show_default=True, help="Of an answer."),
    click.option(
        "--shared-prefix-tokens", type=Whole(0), default=0, show_default=True, help="That prompts begin alike with."
    ),
    click.option("--prefix-groups", type=COUNT, default=1, show_default=True, help="Different beginnings."),
    click.option("--prompt", metavar="TEXT", help="The same prompt each time."),
    click.option("--prompts", metavar="FILE", help="Prompts of a file: .txt a line each, .jsonl with `prompt`."),
    click.option("--stop-at-eos", is_flag=True, help="Let answers end where the model ends them."),
)

report_options = stack(
    click.option("--slo-ttft", type=MILLISECONDS, metavar="MS", help="A good answer's time to first token."),
    click.option("--slo-itl", type=MILLISECONDS, metavar="MS", help="Its mean time between tokens."),
    click.option("--slo-e2e", type=MILLISECONDS, metavar="MS", help="Its whole time."),
    click.option("--html", "html_file", metavar="FILE", help="A report with plots, one file."),
    click.option("--png", "png_file", metavar="FILE", help="The plots as a picture (needs matplotlib)."),
    click.option("--csv", "csv_file", metavar="FILE", help="A line a level; - is stdout."),
    click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object on stdout."),
    report_option,
    click.option("--no-limits", is_flag=True, help="Leave out measuring the machine (a few seconds)."),
)
