"""`penstock submit`: a server as a Slurm job."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from penstock.cli.options import COUNT, FiniteFloat, Whole, stack
from penstock.cli.serve import PORT, serve
from penstock.errors import UsageError

# Options of `penstock serve` that are ours here, and those that mean nothing in a job (a key must not be typed at all).
_OWN = ("host", "port", "uds", "fallback_ports", "api_key_file", "no_auth", "json_ready", "drain_seconds", "cpus")
_MEANINGLESS = ("model_id", "ask", "launcher", "env", "api_key", "debug")
PASSED = [param for param in serve.params if isinstance(param, click.Option)]
PASSED = [param for param in PASSED if param.name not in (*_OWN, *_MEANINGLESS)]

resource_options = stack(
    click.option("-p", "--partition", metavar="NAME", help="Of the nodes.  [default: the site's]"),
    click.option("-A", "--account", metavar="NAME", help="Who pays.  [default: the site profile's]"),
    click.option(
        "-t", "--time", metavar="TIME", help="Slurm's notation: 90, 3:00:00, 2-00.  [default: the partition's]"
    ),
    click.option("-G", "--gpus", metavar="[TYPE:]N", help="Cards, or slices of one: 1, a100:2, a100l.3:1."),
    click.option("-c", "--cpus-per-task", "--cpus", "cpus", type=COUNT, help="Cores.  [default: the site's]"),
    click.option("--mem", metavar="SIZE", help="Memory: 16G.  [default: the site's]"),
    click.option("-q", "--qos", metavar="NAME", help="Quality of service."),
    click.option("-C", "--constraint", metavar="LIST", help="Features that the node must have."),
    click.option("--sbatch", multiple=True, metavar="FLAG", help="Any other flag of sbatch, as --sbatch=--FLAG=VALUE."),
    click.option("--site", metavar="NAME", help="A site profile: a shipped one or a file.  [default: found]"),
)

service_options = stack(
    click.option("-n", "--name", metavar="NAME", help="How other commands call it.  [default: from the model]"),
    click.option("--hostname", "--host", "host", default="0.0.0.0", show_default=True, help="Address to listen on."),  # noqa: S104
    click.option("--port", type=PORT, help="Tried first.  [default: 10000 + last four digits of the job's number]"),
    click.option(
        "--uds", "socket", is_flag=True, help="A unix socket on the node instead of a port: only you reach it."
    ),
    click.option("--api-key-file", metavar="FILE", help="Keys, one a line (mode 600).  [default: a key is made]"),
    click.option("--no-auth", is_flag=True, help="Ask for no key. Everybody on the cluster can then use it."),
    click.option(
        "--drain-seconds",
        type=FiniteFloat(0, 86400),
        default=25.0,
        show_default=True,
        help="At its end, how long running requests may take to finish.",
    ),
    click.option("--stage", is_flag=True, help="Bring the model to the node's RAM disk or local disk first."),
    click.option("--renew", is_flag=True, help="Before the time limit, a successor takes over; each submits the next."),
    click.option("--renewals", type=Whole(1, 100), metavar="N", help="So many successors, all submitted now."),
    click.option("--requeue/--no-requeue", default=True, show_default=True, help="Come back after a preemption."),
)


@click.command(short_help="Start a server as a Slurm job.")
@click.argument("model")
@service_options
@resource_options
@click.option("--wait/--no-wait", default=False, help="Return when it takes requests.")
@click.option("--wait-seconds", type=FiniteFloat(0), metavar="S", help="With --wait, at most so long.")
@click.option("--dry-run", is_flag=True, help="Print the batch script and submit nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def submit(model: str, as_json: bool, dry_run: bool, **options: Any) -> int | None:
    """Start a server of MODEL as a Slurm job, and give it a name.

    Every option of `penstock serve` works here too. Then: `penstock chat --job NAME`, `url`, `tunnel`, `logs`, `stop`.
    """
    from penstock.cluster import submission
    from penstock.cluster.script import Resources, Service, sbatch_flags, seconds_of
    from penstock.plan.site import load_site

    if options["no_auth"] and options["api_key_file"] is not None:
        raise UsageError("--no-auth and --api-key-file contradict each other.", "", "Give one of them.")
    site = load_site(options["site"])
    account = options["account"] or site.account or None
    if site.account_required and account is None:
        raise UsageError(
            f"Jobs of {site.title or site.name} need an account.",
            "",
            "Give --account, or set `account` in the site profile.",
        )
    resources = Resources(
        **{field: options[field] for field in ("partition", "qos", "time", "gpus", "cpus", "mem", "constraint")},
        account=account,
        gpu_flag=site.gpu_flag,
        more=(*site.sbatch, *sbatch_flags(options["sbatch"])),
    )
    if resources.time is not None:
        seconds_of(resources.time)  # before anything is written
    service = Service(
        model=_model(model),
        options=tuple(_passed(options)),
        key_file=None if options["no_auth"] else _key_file(options["api_key_file"]),
        host=options["host"],
        port=options["port"],
        socket=options["socket"] or site.ports.unix,
        drain_seconds=options["drain_seconds"],
        requeue=options["requeue"],
        stage=options["stage"],
        ports=site.ports,
        modules=site.modules,
    )
    renewal = submission.Renewal(options["renewals"]) if options["renew"] or options["renewals"] else None
    if dry_run:
        submission.plan_renewal(renewal, submission.time_limit(resources))
        click.echo(submission.draft(model, resources, service, options["name"]), nl=False)
        return None
    done = submission.submit(options["name"], resources, service, renewal)
    _say(f"Submitted job {', '.join(done.jobs)} as {done.launch.name!r}.")
    _say(f"Script: {done.launch.script}")
    return _follow(done, options, as_json)


def _follow(done: Any, options: dict[str, Any], as_json: bool) -> int | None:
    """Wait if asked, and report."""
    from penstock.cluster import fleet, slurm, words

    launch = done.launch
    report: dict[str, Any] = {"job": done.jobs[0], "name": launch.name, "script": str(launch.script)}
    if len(done.jobs) > 1:
        report["successors"] = done.jobs[1:]
    if options["wait"]:
        server = fleet.wait(launch, _say, options["wait_seconds"])
        reached = fleet.reach(server) is not None
        report |= {"state": server.state, "url": server.url, "socket": server.socket, "node": server.node}
        report |= {"key_file": server.key_file, "reachable_from_here": reached}
        _say(f"{launch.name} takes requests: job {server.job} on {server.node}, {server.url or server.socket}")
        if not reached:
            _say(f"This machine does not reach it directly; `penstock tunnel {launch.name}` does.")
    else:
        job = slurm.one(done.jobs[0])
        report["state"] = "pending" if job is None else job.state.lower()
        if job is not None and words.hopeless(job.reason):
            _say(f"WARNING: {words.pending(job.reason, job.id)}")
    if as_json:
        click.echo(json.dumps(report))
    elif options["wait"]:
        _say(f"Ask it: penstock chat --job {launch.name} QUESTION    End it: penstock stop {launch.name}")
    else:
        _say(f"Wait for it: penstock url {launch.name} --wait    End it: penstock stop {launch.name}")
    return None


def _model(model: str) -> str:
    """A folder gets its full path, for the job runs elsewhere; anything else stays what it is."""
    folder = Path(model).expanduser()
    try:
        return str(folder.resolve()) if model != "demo" and folder.exists() else model
    except OSError:
        return model


def _key_file(given: str | None) -> str:
    """The full path of a key file that the server will accept; empty for a key of the launch's own."""
    if given is None:
        return ""
    from penstock.server.key import read_keys

    return str(read_keys(given).file)


def _passed(options: dict[str, Any]) -> Iterator[str]:
    """The options of `penstock serve` that were given, as its flags."""
    context = click.get_current_context()
    for option in PASSED:
        if option.name is None or context.get_parameter_source(option.name) is ParameterSource.DEFAULT:
            continue
        value = options[option.name]
        flag = max(option.opts, key=len)
        if option.is_flag:
            off = option.secondary_opts
            if value or off:
                yield flag if value else max(off, key=len)
        elif option.multiple:
            for item in value:
                yield from (flag, str(item))
        elif value is not None:
            file = option.metavar == "FILE"  # the job runs in another folder
            yield from (flag, str(Path(value).expanduser().absolute()) if file else str(value))


def _unknown_to_tgi(options: Iterable[click.Option]) -> Iterator[click.Option]:
    """The same options without TGI's environment names: a login shell's PORT or QUANTIZE must not end up in a job."""
    for option in options:
        own = copy.copy(option)
        own.envvar = None
        own.opts = [name for name in option.opts if name.startswith("--")] or option.opts  # -p is the partition here
        yield own


submit.params.extend(_unknown_to_tgi(PASSED))


def _say(line: str) -> None:
    click.echo(line, err=True)
