"""Many servers at once: each gets its own name and port."""

from __future__ import annotations

import json
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

from penstock.cluster.web import Endpoint, get
from tests.process import command, environment

from .conftest import User

SMALL = ("--threads", "1", "--max-batch-total-tokens", "2048", "--json")


def _submit(user: User, *flags: str) -> subprocess.CompletedProcess[bytes]:
    return user.run("submit", "demo", *SMALL, *flags)


def test_at_once_on_shared_nodes(user: User) -> None:
    """Five submissions side by side, one of them onto a port that somebody has: five names, five ports, five answers."""
    with socket.socket() as squatter:
        first = json.loads(_submit(user, "--name", "taken", "--sbatch=--hold").stdout)["job"]
        squatter.bind(("0.0.0.0", 10000 + int(first) % 10000))  # noqa: S104
        squatter.listen()
        user.cluster.run("scontrol", "release", first)
        with ThreadPoolExecutor(4) as pool:
            others = list(pool.map(lambda _: _submit(user), range(4)))
        assert [done.returncode for done in others] == [0] * 4
        names = ["taken", *(json.loads(done.stdout)["name"] for done in others)]
        assert sorted(names) == ["demo", "demo-2", "demo-3", "demo-4", "taken"]
        found = [user.json("url", name, "--wait") for name in names]
        ports = [server["port"] for server in found]
        assert len(set(ports)) == 5
        assert ports[0] != 10000 + int(first) % 10000
        for server in found:
            with open(server["key_file"]) as stream:
                status, _ = get(Endpoint("127.0.0.1", server["port"]), "/info", stream.read().strip())
            assert status == 200


def test_one_name_twice(user: User) -> None:
    """Two at once under one name: one wins, the other is told; and so is whoever comes later."""
    line = command("submit", "demo", *SMALL, "--name", "mine", "--sbatch=--hold")
    env = environment(user.home, **user.environment())
    both = [subprocess.Popen(line, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=60)[1].decode() for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    assert any("There is already a server 'mine'" in text for text in said)
    assert len([server for server in user.json("jobs") if server["name"] == "mine"]) == 1
    late = _submit(user, "--name", "mine")
    assert late.returncode == 2
    assert b"is pending" in late.stderr


def test_a_job_of_somebody_else_with_the_same_name(user: User) -> None:
    """Names are a matter of each user's registry: another user's job is neither shown nor stopped."""
    theirs = user.cluster.run(
        "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
        "sbatch", "--parsable", "--hold", "--chdir=/", "--output=/dev/null", "--job-name=penstock-demo", "--wrap=true",
    )  # fmt: skip
    assert user.json("jobs") == []
    done = user.run("stop", "demo")
    assert done.returncode == 2
    assert b"There is no server 'demo'" in done.stderr
    user.cluster.wait_state(theirs, "PENDING")
    user.cluster.run("scancel", theirs)
