"""A real Slurm, started once; the commands as a user types them; nothing of a test's servers stays."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.process import penstock

from . import slurm
from .slurm import Cluster

NOBODY = 65534


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    why = slurm.obstacle()
    if why:
        pytest.skip(why)
    found = slurm.start(count=3, cpus=8)
    yield found
    found.stop()


@dataclass
class User:
    """Somebody at the cluster's login node. home: on the file system that the nodes share."""

    cluster: Cluster
    home: Path

    @property
    def jobs_directory(self) -> Path:
        return self.home / ".local/state/penstock/jobs"

    def environment(self, **extra: str) -> dict[str, str]:
        return {**self.cluster.environment, "XDG_RUNTIME_DIR": "", "HF_HUB_OFFLINE": "1", **extra}

    def run(self, *args: str | Path, timeout: float = 90, **extra: str) -> subprocess.CompletedProcess[bytes]:
        """A command of Penstock, to its end."""
        return penstock(*args, home=self.home, timeout=timeout, **self.environment(**extra))

    def json(self, *args: str | Path, **extra: str) -> Any:
        """The JSON that a command prints; it must succeed."""
        done = self.run(*args, "--json", **extra)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    def submit(self, model: str, *flags: str, **extra: str) -> Any:
        """A server that is ready. One thread and little memory, for many of them share this machine."""
        return self.json(
            "submit", model, "--wait", "--threads", "1", "--max-batch-total-tokens", "4096", *flags, **extra
        )

    def server(self, name: str) -> Any:
        """What `penstock jobs` says of one."""
        return next(server for server in self.json("jobs") if server["name"] == name)


@pytest.fixture
def user(cluster: Cluster, tmp_path: Path) -> Iterator[User]:
    found = User(cluster, tmp_path)
    yield found
    found.run("stop", "--all")


@pytest.fixture(scope="module")
def resident(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[User]:
    """A user whose server `demo` is ready; tests share it and leave it as it is."""
    found = User(cluster, tmp_path_factory.mktemp("home"))
    found.submit("demo", "--name", "demo")
    yield found
    found.run("stop", "--all")


def as_nobody(action: Callable[[], object]) -> bool:
    """Whether another user of the machine can do something: a child process tries it with that user's rights."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
