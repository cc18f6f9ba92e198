"""Servers that move: preempted, renewed, killed. The name stays, the key stays, and clients that retry lose nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

from penstock.cluster.registry import Launch
from tests.process import command, environment

from .conftest import User

QUESTION = "What does sinfo do?"


class Client(threading.Thread):
    """Asks a server by its name, one question after the other, until it is told to end."""

    def __init__(self, user: User, name: str) -> None:
        super().__init__(daemon=True)
        self._user, self._name = user, name
        self._enough = threading.Event()
        self.answers: list[subprocess.CompletedProcess[bytes]] = []

    def run(self) -> None:
        while not self._enough.is_set():
            self.answers.append(self._user.run("chat", "--job", self._name, QUESTION))
            time.sleep(0.3)

    def end(self) -> None:
        self._enough.set()
        self.join(90)
        assert len(self.answers) >= 2
        lost = [
            done.stderr.decode() for done in self.answers if done.returncode != 0 or b"partitions" not in done.stdout
        ]
        assert not lost


def test_a_preempted_server_comes_back(user: User) -> None:
    ready = user.submit("demo", "--name", "guest", "--partition", "low", "--cpus", "4")
    key = Path(ready["key_file"]).read_text()
    client = Client(user, "guest")
    client.start()
    out = f"--output={user.home}/hog"
    hog = user.cluster.run("sbatch", "--parsable", "-w", ready["node"], "-c", "8", out, "--wrap=sleep 2")
    user.cluster.wait_state(hog, "COMPLETED")
    user.cluster.wait_state(ready["job"], "RUNNING")
    again = user.json("url", "guest", "--wait")
    assert again["job"] == ready["job"]
    assert Path(again["key_file"]).read_text() == key
    client.end()
    log = user.run("logs", "guest").stdout.decode()
    assert "leaving: Slurm sent SIGUSR1" in log
    assert log.count("all of it") == 2  # both lives in one log


def test_a_successor_takes_over(user: User) -> None:
    """The second job of a launch gets ready; the first one lets its requests finish and leaves by itself."""
    ready = user.submit("demo", "--name", "relay", "--time", "10:00", "--renew")
    launch = Launch("relay", Path(ready["script"]).parent)
    successor = max(launch.jobs(), key=int)
    assert successor != ready["job"]  # submitted by the first job, from its node
    shown = [server for server in user.json("jobs") if server["name"] == "relay"]
    assert [server["state"] for server in shown] == ["ready", "pending"]
    assert "takes over" in shown[1]["why"]
    client = Client(user, "relay")
    client.start()
    user.cluster.run("scontrol", "update", f"JobId={successor}", "Dependency=")  # as if its minutes were over
    user.cluster.wait_state(ready["job"], "COMPLETED", seconds=60)
    assert user.json("url", "relay")["job"] == successor
    client.end()
    assert len(launch.jobs()) == 3  # and it has asked for its own successor
    user.run("stop", "relay")
    assert not [line for line in user.cluster.run("squeue", "--noheader", "--format=%j").split() if "relay" in line]


def test_a_server_that_is_killed_says_how(user: User) -> None:
    ready = user.submit("demo", "--name", "victim", "--no-requeue")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
            environ = (process / "environ").read_bytes()
        except OSError:
            continue
        if f"SLURM_JOB_ID={ready['job']}".encode() in environ and b"serve\0" in line and b"cluster.keeper" not in line:
            os.kill(int(process.name), signal.SIGKILL)
    user.cluster.wait_state(ready["job"], "FAILED")
    server = user.server("victim")
    assert server["state"] == "ended"
    assert "signal 9" in server["why"]


def test_logs_follow_until_the_end(user: User) -> None:
    user.submit("demo", "--name", "talker")
    env = environment(user.home, **user.environment())
    follower = subprocess.Popen(command("logs", "talker", "-f"), env=env, stdout=subprocess.PIPE)
    time.sleep(1)
    user.run("stop", "talker")
    said, _ = follower.communicate(timeout=40)
    assert follower.returncode == 0
    assert b"all of it" in said
    assert b"the server has ended" in said
