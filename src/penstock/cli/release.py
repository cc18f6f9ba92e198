"""`penstock release`: everything that a machine without internet needs, built, checked and installed."""

from __future__ import annotations

import json
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from penstock.errors import EnvironmentFault, UsageError

TARGET_HELP = "As `penstock release target` prints it there.  [default: this machine]"


@click.group(short_help="Build, check and install a release for machines without internet.")
def release() -> None:
    """A release is a folder, or a tar of it, with wheels for one kind of machine, their hashes and licences, an
    installer that needs neither network nor root, and modulefiles for Lmod and environment-modules.
    """


@release.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def target(as_json: bool) -> None:
    """Print what this machine is as a target: Python, C library, processor, NVIDIA driver."""
    from penstock.cluster.release.target import this_machine

    found = str(this_machine())
    click.echo(json.dumps({"target": found}) if as_json else found)


@release.command()
@click.option("--target", "wanted", metavar="TARGET", help=TARGET_HELP)
@click.option("--output", "-o", metavar="DIR", default=".", help="Where the release is made.  [default: here]")
@click.option("--source", metavar="DIR|WHEEL", help="Penstock's source tree or wheel.  [default: what runs now]")
@click.option("--index", "indexes", multiple=True, metavar="URL", help="A further package index; may be repeated.")
@click.option("--with", "extras", multiple=True, metavar="PACKAGE", help="A further package, as pip names it.")
@click.option("--constraint", metavar="FILE", help="Versions, as pip has them.  [default: the source tree's]")
@click.option("--tar", is_flag=True, help="Also as one tar file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def build(
    wanted: str | None,
    output: str,
    source: str | None,
    indexes: tuple[str, ...],
    extras: tuple[str, ...],
    constraint: str | None,
    tar: bool,
    as_json: bool,
) -> None:
    """Make a release, where there is internet. Wheels that the target cannot run are refused here, not there."""
    from penstock.cluster.release.build import build_release, pack
    from penstock.cluster.release.target import parse_target, this_machine

    chosen = parse_target(wanted) if wanted else this_machine()
    given = Path(source).expanduser() if source else None
    if given is not None and not given.exists():
        raise UsageError(f"{given} does not exist.", "", "--source takes Penstock's source tree, or a wheel of it.")
    versions = Path(constraint).expanduser() if constraint else None
    if versions is not None and not versions.is_file():
        raise UsageError(f"{versions} does not exist.", "", "--constraint takes a file with lines like numpy==2.4.6.")
    folder = Path(output).expanduser()
    made = build_release(chosen, folder, given, indexes, extras, versions, lambda line: click.echo(line, err=True))
    packed = pack(made) if tar else None
    if as_json:
        facts = json.loads((made / "release.json").read_text())
        click.echo(json.dumps({**facts, "path": str(made), "tar": str(packed) if packed else None}))
        return
    click.echo(f"there: sh {made.name}/install.sh PREFIX", err=True)
    click.echo(str(packed or made))


@release.command()
@click.argument("wanted", metavar="TARGET")
@click.argument("path", metavar="RELEASE")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def check(wanted: str, path: str, as_json: bool) -> None:
    """Check RELEASE (a folder or a tar) against TARGET: every wheel's tags, the C library that its compiled files
    really ask for, CUDA against the driver; and that no file is damaged. Exit code 3 when something does not fit."""
    from penstock.cluster.release.build import refusal
    from penstock.cluster.release.check import check_release
    from penstock.cluster.release.target import parse_target

    chosen = parse_target(wanted)
    with _unpacked(Path(path).expanduser()) as folder:
        findings = check_release(folder, chosen)
    if as_json:
        rows = [{"file": finding.wheel, "fault": finding.fault} for finding in findings]
        click.echo(json.dumps({"target": str(chosen), "fits": not findings, "faults": rows}))
        if findings:
            raise click.exceptions.Exit(EnvironmentFault.exit_code)
        return
    if findings:
        raise refusal(findings, chosen)
    click.echo(f"{path} runs on {chosen}")


@release.command()
@click.argument("path", metavar="RELEASE")
@click.argument("prefix")
def install(path: str, prefix: str) -> None:
    """Install RELEASE (a folder or a tar) into PREFIX, a new folder; as `sh install.sh PREFIX` in the release does.
    The installed tree may be moved."""
    with _unpacked(Path(path).expanduser()) as folder:
        script = folder / "install.sh"
        if not script.is_file():
            raise EnvironmentFault(f"{path} is not a release.", "", "Make one with `penstock release build`.")
        done = subprocess.run(["/bin/sh", str(script), str(Path(prefix).expanduser())], stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        raise click.exceptions.Exit(done.returncode)


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """The folder of a release, unpacked for a while where it is a tar."""
    if path.is_dir():
        yield path
        return
    try:
        with tempfile.TemporaryDirectory(prefix="penstock-release-") as temporary, tarfile.open(path) as archive:
            archive.extractall(temporary, filter="data")
            yield next(Path(temporary).iterdir())
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist.", "", "Give a release: a folder, or its tar.") from None
    except (tarfile.TarError, StopIteration) as error:
        raise EnvironmentFault(f"{path} is not a release.", f"It is no tar file: {error}.") from None
