"""A server's life as a job: found by its name, reached without typing a port, secret, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from penstock.cluster.web import Endpoint, get
from tests.process import check_error, command, environment

from .conftest import User, as_nobody

QUESTION = "What does sinfo do?"


def _answers(user: User, *args: str) -> bytes:
    done = user.run("chat", *args, QUESTION)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_submit_chat_tunnel_stop(user: User) -> None:
    ready = user.submit("demo")
    assert ready["name"] == "demo"
    assert ready["state"] == "ready"
    assert ready["url"].endswith(f":{10000 + int(ready['job']) % 10000}")
    here = _answers(user, "--job", "demo")
    assert b"partitions" in here
    assert _answers(user, "--job", "demo", "--tunnel") == here
    key = Path(ready["key_file"])
    assert key.stat().st_mode & 0o777 == 0o600
    stopped = user.json("stop", "demo")
    assert stopped == {"demo": [ready["job"]]}
    assert not key.exists()
    assert user.server("demo")["state"] == "ended"
    check_error(user.run("chat", "--job", "demo", QUESTION), 3, "does not take requests", "ended")


def test_jobs_says_what_a_server_does(resident: User) -> None:
    before = resident.server("demo")
    assert before["state"] == "ready"
    assert before["node"].startswith("pn")
    assert 0 < before["left"] <= 600
    for _ in range(30):
        _answers(resident, "--job", "demo")
        server = resident.server("demo")
        if server["tokens_per_second"] > 0:
            break
    assert server["tokens_per_second"] > 0
    table = resident.run("jobs").stdout.decode()
    assert server["url"] in table
    assert server["job"] in table


def test_url_and_logs(resident: User) -> None:
    url = resident.json("url", "demo")
    assert resident.run("url", "demo").stdout.decode().strip() == url["url"]
    log = resident.run("logs", "demo").stdout.decode()
    assert "ready" in log
    assert resident.run("logs", "demo", "-n", "2").stdout.decode().splitlines() == log.splitlines()[-2:]


def test_a_tunnel_needs_no_key_of_its_own_and_ends_with_ctrl_c(resident: User) -> None:
    env = environment(resident.home, **resident.environment())
    process = subprocess.Popen(command("tunnel", "demo"), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    url = process.stdout.readline().decode().strip()
    door = Endpoint("127.0.0.1", int(url.rpartition(":")[2]))
    assert get(door, "/health")[0] == 200
    assert get(door, "/info")[0] == 401
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "to job" in errors.decode()


def test_the_ssh_line_for_a_laptop(resident: User) -> None:
    url = resident.json("url", "demo")
    line = resident.run("tunnel", "demo", "--print", "--login", "cluster.example").stdout.decode().strip()
    assert line == f"ssh -N -L {url['port']}:{url['host']}:{url['port']} cluster.example"


def test_a_job_that_waits_for_the_server(resident: User) -> None:
    after = resident.run("url", "demo", "--dependency").stdout.decode().strip()
    assert after.startswith("afterok:")
    resident.cluster.wait_state(after.removeprefix("afterok:"), "COMPLETED")
    out = resident.home / "out"
    job = resident.cluster.run(
        "sbatch", "--parsable", f"--dependency={after}", f"--output={out}", "--wrap=echo after it"
    )
    resident.cluster.wait_state(job, "COMPLETED")
    assert out.read_text() == "after it\n"


def test_where_only_slurm_reaches_the_node(user: User) -> None:
    """The server listens on the node's own loopback: connections go through srun."""
    ready = user.submit("demo", "--name", "inside", "--host", "127.0.0.1")
    assert not ready["reachable_from_here"]
    assert b"partitions" in _answers(user, "--job", "inside")


def test_a_unix_socket(user: User) -> None:
    ready = user.submit("demo", "--uds", "--name", "sock")
    assert ready["url"] is None
    path = ready["socket"]
    assert b"partitions" in _answers(user, "--job", "sock")

    def connect() -> None:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(path)

    assert not as_nobody(connect)
    user.run("stop", "sock")
    assert not Path(path).parent.exists()


def test_secrets(resident: User) -> None:
    """The key is in its file and nowhere else; another user cannot read anything of the server."""
    ready = resident.json("url", "demo")
    key_file = Path(ready["key_file"])
    key = key_file.read_text().strip()
    assert len(key) >= 40
    jobs = resident.jobs_directory
    for file in (file for file in jobs.rglob("*") if file.is_file() and file != key_file):
        assert key not in file.read_text(errors="replace"), file
        assert file.stat().st_mode & 0o077 == 0, file
    told = resident.cluster.run("scontrol", "show", "job", ready["job"]) + resident.cluster.run("squeue", "-o", "%all")
    assert key not in told
    spool = [
        file for node in resident.cluster.nodes for file in (resident.cluster.directory / f"spool.{node}").rglob("*")
    ]
    state = [*spool, *(resident.cluster.directory / "state").rglob("*"), *resident.cluster.directory.glob("*.log")]
    assert state
    for file in (file for file in state if file.is_file()):
        assert key.encode() not in file.read_bytes(), file
    seen = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ, cmdline = (process / "environ").read_bytes(), (process / "cmdline").read_bytes()
        except OSError:
            continue
        seen += f"SLURM_JOB_ID={ready['job']}".encode() in environ
        assert key.encode() not in environ + cmdline, cmdline
    assert seen >= 3  # the keeper, the server, the engine
    for action in (lambda: key_file.read_text(), lambda: os.listdir(jobs), lambda: (jobs / "demo").stat()):
        assert not as_nobody(action)
    door = Endpoint("127.0.0.1", ready["port"])
    assert get(door, "/info")[0] == 401
    assert get(door, "/info", key)[0] == 200


def test_nothing_secret_of_the_shell_goes_along(user: User) -> None:
    token = "hf_" + "x" * 34
    ready = user.submit("demo", "--name", "quiet", HF_TOKEN=token, API_KEY=token)
    time.sleep(0.5)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = (process / "environ").read_bytes()
        except OSError:
            continue
        if f"SLURM_JOB_ID={ready['job']}".encode() in environ:
            assert token.encode() not in environ
