"""`penstock download`: fetch a model where there is internet, so that it can be used where there is none."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penstock.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from penstock.hub.transfer import Meter

LINE_SECONDS = 15.0
PRIVATE, GROUP = 0o027, 0o002


@click.command(short_help="Fetch a model where there is internet, verified, for use without.")
@click.argument("model")
@click.option("--revision", metavar="REV", help="Branch, tag or commit.  [default: main]")
@click.option("--to", metavar="DIR", help="Plain files into this folder.  [default: the hub cache]")
@click.option("--file", "only", metavar="NAME", help="Only this file of the repository: a GGUF.")
@click.option("--trust-remote-code", is_flag=True, help="The model's .py files as well; needs a full commit.")
@click.option(
    "--token-file", metavar="FILE", help="Read the hub token from here.  [default: where `hf auth login` put it]"
)
@click.option(
    "--umask", metavar="OCTAL", help="Rights to withhold.  [default: 002 in a folder shared by setgid, else 027]"
)
@click.option("--site", metavar="NAME", help="Site profile: a shipped one or a file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def download(
    model: str,
    revision: str | None,
    to: str | None,
    only: str | None,
    trust_remote_code: bool,
    token_file: str | None,
    umask: str | None,
    site: str | None,
    as_json: bool,
) -> None:
    """Fetch MODEL (a hub name ORG/NAME[@REVISION], or a name of the catalogue): only what Penstock reads, all of one
    commit, every file checked against the hub's SHA-256. Run it again after an interruption: it goes on.

    Prints the folder. Serving from it, or from the cache with --offline, opens no connection.
    """
    from penstock.hub.cache import cache_folder
    from penstock.hub.download import download_snapshot
    from penstock.hub.refusals import UnknownModel, Unreachable
    from penstock.hub.remote_code import is_commit
    from penstock.hub.snapshot import hub_source, unknown

    name, revision = hub_source(model, revision)
    if trust_remote_code and not is_commit(revision):
        raise UsageError(
            "Code is fetched of one commit for good: a branch's can change.",
            "",
            f"penstock download {name} --trust-remote-code --revision COMMIT (40 hexadecimal digits)",
        )
    token = _token(token_file)
    folder = Path(to).expanduser() if to else None
    os.umask(_umask(umask, folder or cache_folder()))
    try:
        _check_online(name)
        with _Shown(name) as shown:
            done = download_snapshot(
                name, revision, to=folder, token=token, code=trust_remote_code, only=only, show=shown.update
            )
    except UnknownModel as error:
        raise unknown(model, error.why) from error
    except Unreachable as error:
        error.hint = _where_to_run(name, revision, to, site)
        raise
    path = done.path / only if only else done.path
    rate = done.fetched / max(done.seconds, 1e-9)
    if as_json:
        report: dict[str, Any] = {
            "model": name, "commit": done.commit, "path": str(path), "files": done.files, "bytes": done.size,
            "fetched_bytes": done.fetched, "seconds": round(done.seconds, 2), "bytes_per_second": int(rate),
            "verified": True,
        }  # fmt: skip
        click.echo(json.dumps(report))
        return
    speed = f" at {rate / 1e6:.0f} MB/s" if done.fetched else ", nothing new"
    click.echo(f"{name}@{done.commit[:8]}: {done.files} files, {done.size / 1e9:.2f} GB, verified{speed}", err=True)
    click.echo(str(path))


def _check_online(name: str) -> None:
    from penstock.hub.cache import is_offline
    from penstock.hub.refusals import Unreachable

    if is_offline():
        raise Unreachable(name, "HF_HUB_OFFLINE forbids asking the hub.")


def _token(file: str | None) -> str | None:
    """The token in a file, checked to be ours alone. Warns of a token in a job's environment: Slurm may store it."""
    if os.environ.get("SLURM_JOB_ID") and (os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")):
        print(
            "warning: a hub token is in this job's environment, which Slurm may store and show; "
            "use `hf auth login` or --token-file",
            file=sys.stderr,
        )
    if file is None:
        return None
    path = Path(file).expanduser()
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is not plain text"
        raise EnvironmentFault(f"The token file {path} cannot be read: {why}.") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise EnvironmentFault(f"Others may read the token file {path}.", "", f"Make it yours alone: chmod 600 {path}")
    if not text or len(text) > 500 or not text.isprintable() or " " in text:
        raise UsageError(f"The file {path} holds no token.", "", "It must hold the token alone, on one line.")
    return text


def _umask(asked: str | None, folder: Path) -> int:
    """The rights to withhold from new files: what was asked, else the group's custom of the folder."""
    if asked is not None:
        try:
            value = int(asked, 8)
        except ValueError:
            value = -1
        if not 0 <= value <= 0o777 or value & 0o700:
            raise UsageError(f"{asked!r} is no umask.", "", "It is three octal digits, like 027; the first one is 0.")
        return value
    there = folder.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    return GROUP if there.stat().st_mode & stat.S_ISGID else PRIVATE


def _where_to_run(name: str, revision: str | None, to: str | None, site_name: str | None) -> str:
    """What to type, and on which machine, where this one has no internet."""
    from penstock.plan.site import load_site

    site = load_site(site_name)
    line = " ".join(["penstock download", name + (f"@{revision}" if revision else ""), *(["--to", to] if to else [])])
    if site.internet.proxy and not os.environ.get("https_proxy"):
        return f"{site.title or site.name} has a proxy: export https_proxy={site.internet.proxy}\nand run: {line}"
    where = "Where there is internet (often the login node)"
    if site.internet.compute == "no" and os.environ.get("SLURM_JOB_ID"):
        where = f"Compute nodes of {site.title or site.name} have no internet. On its login node"
    if site.ssh:
        where += f", {site.ssh},"
    return f"{where} run: {line}\nand use the same folder here (HF_HOME, or the path itself)."


class _Shown:
    """The progress of the download: a bar on a terminal, one line every 15 seconds anywhere else."""

    def __init__(self, name: str) -> None:
        self._name, self._last = name, float("-inf")
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Shown:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            self._bar = Progress(
                TextColumn(self._name, markup=False), BarColumn(), TextColumn("{task.fields[line]}", markup=False),
                console=Console(stderr=True),
            )  # fmt: skip
            self._task = self._bar.add_task("", total=1, line="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, meter: Meter) -> None:
        """Show the state, when it is time; the command itself says how it ended."""
        from penstock.hub.download import progress_line

        if self._bar is not None:
            self._bar.update(self._task, total=meter.total or 1, completed=meter.done, line=progress_line(meter))
        elif meter.done < meter.total and time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            print(f"{self._name}: {progress_line(meter)}", file=sys.stderr, flush=True)
