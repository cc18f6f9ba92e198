"""The leaders of a job's nodes, spoken to together: one step of `srun` that lives while a model is staged."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from penstock.cluster import slurm
from penstock.errors import EnvironmentFault, PenstockError

START_SECONDS = 120.0
Answers = dict[str, dict[str, Any]]  # by node


class LeaderFailed(PenstockError):
    """A command failed on a node."""


class Crew:
    """One leader on each of some nodes."""

    def __init__(self, job: str, nodes: int, names: Sequence[str] = ()) -> None:
        """nodes: how many; names: which (any of the job when empty). Raises EnvironmentFault."""
        if not slurm.available("srun"):
            raise slurm.missing("srun")
        command = [
            "srun", f"--jobid={job}", "--overlap", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
            "--mpi=none", "--quiet", "--kill-on-bad-exit=1", "--unbuffered", "--export=ALL", "--cpu-bind=none",
            *([f"--nodelist={','.join(names)}"] if names else []),
            sys.executable, "-m", "penstock.cluster.staging.leader",
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") or k == "SLURM_CONF"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
        self._turn, self._count, self._buffer = 0, nodes, b""
        hellos = self._collect(None, START_SECONDS)
        self.nodes = sorted(hellos, key=_natural)
        self.step = f"{job}.{next(iter(hellos.values()))['step']}"

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(10)

    def ask(self, do: str, seconds: float = 7200.0, **arguments: Any) -> Answers:
        """Send a command to all and wait for every answer. Raises LeaderFailed with the words of the first node."""
        self._turn += 1
        line = json.dumps({"turn": self._turn, "do": do, **arguments}) + "\n"
        assert self._process.stdin is not None  # noqa: S101 (for mypy)
        try:
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        answers = self._collect(self._turn, seconds)
        for node, answer in answers.items():
            if "error" in answer:
                raise LeaderFailed(f"{node}: {answer['error']}.")
        return answers

    def _collect(self, turn: int | None, seconds: float) -> Answers:
        """One line of every leader."""
        out = self._process.stdout
        assert out is not None  # noqa: S101 (for mypy)
        answers: Answers = {}
        end = time.monotonic() + seconds
        with selectors.DefaultSelector() as watched:
            watched.register(out, selectors.EVENT_READ)
            while len(answers) < self._count:
                if not watched.select(max(0.0, end - time.monotonic())):
                    raise EnvironmentFault(
                        f"{self._count - len(answers)} of {self._count} nodes did not answer within {seconds:g} s.",
                        hint="Are other steps of the job using all its cores? `squeue --steps --me` shows them.",
                    )
                data = os.read(out.fileno(), 65536)
                if not data:
                    raise self._died()
                *lines, self._buffer = (self._buffer + data).split(b"\n")
                for line in lines:
                    answer = json.loads(line)
                    if answer.get("turn") == turn:
                        answers[str(answer["node"])] = answer
        return answers

    def _died(self) -> EnvironmentFault:
        self._process.kill()
        error = self._process.stderr.read().decode("utf-8", "replace").strip() if self._process.stderr else ""
        last = error.splitlines()[-1] if error else "it said nothing"
        return EnvironmentFault("The step that stages has ended.", f"srun: {last[:300]}")


def _natural(name: str) -> tuple[str, int]:
    """`n10` after `n9`."""
    head = name.rstrip("0123456789")
    return head, int(name[len(head) :] or 0)
