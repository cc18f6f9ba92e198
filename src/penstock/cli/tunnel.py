"""`penstock tunnel`: a server in a job at a fixed address of this machine."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import subprocess
import time
from pathlib import Path

import click

from penstock.errors import EnvironmentFault

PORT = click.IntRange(0, 65535)


@click.command(short_help="Bring a server in a Slurm job to a port of this machine.")
@click.argument("name")
@click.option("-p", "--port", type=PORT, default=0, help="On this machine.  [default: a free one]")
@click.option("--print", "only_print", is_flag=True, help="Print the ssh line for a laptop, and end.")
@click.option("--ssh", is_flag=True, help="Through one ssh to the node, instead of TCP or srun.")
@click.option("--login", metavar="HOST", help="The cluster's login node: for the ssh line, or to come from outside.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON line when it is open: url, key file.")
def tunnel(name: str, port: int, only_print: bool, ssh: bool, login: str | None, as_json: bool) -> int | None:
    """Bring the server NAME to a port of this machine, until Ctrl-C; renewals and requeues move the tunnel along.

    On a laptop: penstock tunnel NAME --login HOST. Without Penstock there: `penstock tunnel NAME --print` on the login
    node prints what to type.
    """
    from penstock.cluster import fleet
    from penstock.cluster.tunnel import Tunnel, shown, ssh_line, ssh_to_node
    from penstock.plan.site import load_site

    if login is not None and not only_print:
        return _from_outside(name, port, login, as_json)
    server = fleet.find(name, fleet.ask_slurm()).server
    if only_print:
        click.echo(shown(ssh_line(server, port, login or load_site().ssh or socket.getfqdn())))
        return None
    if ssh:
        port = port or _free_port()
        _ready(f"http://127.0.0.1:{port}", server.key_file, as_json)
        return _run(ssh_to_node(server, port))
    door = Tunnel(name, port, lambda line: click.echo(f"tunnel: {line}", err=True))
    door.start()
    _ready(door.url, server.key_file, as_json)
    while True:
        time.sleep(3600)


def _from_outside(name: str, port: int, login: str, as_json: bool) -> int:
    """On a machine that is not of the cluster: ask Penstock on the login node, fetch the key, run ssh."""
    from penstock.cluster.fleet import Server
    from penstock.cluster.tunnel import ssh_line

    answer = json.loads(_ask(login, f"penstock url {name} --json"))
    port = port or _free_port()
    key_file = None
    if answer["key_file"]:
        key_file = _keep_key(name, _ask(login, f"cat {shlex.quote(answer['key_file'])}"))
    where = {"host": answer["host"], "port": answer["port"], "socket": answer["socket"], "node": answer["node"]}
    empty = {
        "url": None,
        "partition": "",
        "left": None,
        "tokens_per_second": 0.0,
        "running": 0,
        "waiting": 0,
        "why": "",
    }
    server = Server(name=name, job=answer["job"], state="ready", model="", key_file=key_file, log="", **where, **empty)
    _ready(f"http://127.0.0.1:{port}", key_file, as_json)
    return _run(ssh_line(server, port, login))


def _ask(login: str, command: str) -> str:
    """What a command prints on the login node, in a login shell so that modules and paths are there."""
    _need_ssh()
    line = ["ssh", "-o", "BatchMode=no", login, f"bash -lc {shlex.quote(command)}"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EnvironmentFault(
            f"`{command.split()[0]}` on {login} failed.", done.stderr.strip()[-300:], f"Try it by hand: ssh {login}"
        )
    return done.stdout


def _keep_key(name: str, text: str) -> str:
    from penstock.cluster.files import private_directory, write_private

    directory = Path("~/.config/penstock/keys").expanduser()
    private_directory(directory)
    file = directory / f"{name}.key"
    write_private(file, text)
    return str(file)


def _ready(url: str, key_file: str | None, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"url": url, "key_file": key_file}))
        return
    click.echo(url)
    if key_file is not None:
        click.echo(f"Key file: {key_file}", err=True)
        click.echo(f"Ask it: penstock chat --url {url} --api-key-file {key_file}    End the tunnel: Ctrl-C", err=True)


def _run(line: list[str]) -> int:
    from penstock.cluster.tunnel import shown

    _need_ssh()
    click.echo(f"tunnel: {shown(line)}", err=True)
    return subprocess.run(line, check=False).returncode


def _need_ssh() -> None:
    if shutil.which("ssh") is None:
        raise EnvironmentFault("There is no ssh on this machine.", hint="Install OpenSSH's client.")


def _free_port() -> int:
    """A port for ssh, which cannot be asked for a free one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
