"""A farm on a real Slurm under random events, at any size.

    python -m tests.cluster.chaos --prompts 10000 --events 200 --folder DIR [--seconds 280]

brings up a cluster of four nodes and three partitions, submits eight workers of the demo model, and kills, requeues,
preempts, loses nodes, fills disks and starts duplicates until so many events have happened. With --seconds it takes the
whole cluster away at that moment; called again, it goes on with the same farm on a new cluster.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from penstock.batch.farm.audit import audit
from penstock.batch.farm.ledger import Ledger, Life
from penstock.batch.farm.place import process_runs
from penstock.batch.farm.spool import Spool
from penstock.batch.farm.status import status_of
from tests.cluster import slurm
from tests.cluster.slurm import Cluster
from tests.process import command, environment

ENGINE = ("--threads", "1", "--max-batch-size", "32", "--max-batch-total-tokens", "16384", "--max-total-tokens", "256")
KINDS = ("kill", "kill", "kill", "kill supervisor", "term", "requeue", "disk full", "duplicate")
RARE = ("preempt", "lose node")


@dataclass
class Chaos:
    """One farm, its cluster and what was done to it. home: of the user."""

    cluster: Cluster
    home: Path
    rng: random.Random
    events: Counter[str] = field(default_factory=Counter)
    duplicates: list[subprocess.Popen[bytes]] = field(default_factory=list)
    lost_nodes: list[tuple[float, str]] = field(default_factory=list)

    @property
    def farm(self) -> Path:
        return self.home / "farm"

    def run(self, *args: str | Path) -> subprocess.CompletedProcess[bytes]:
        """A command of Penstock at the login node."""
        env = environment(self.home, **self.cluster.environment)
        return subprocess.run(command(*args), env=env, capture_output=True, timeout=120, check=False)

    def checked(self, *args: str | Path) -> bytes:
        """The same, which must succeed: what it printed."""
        done = self.run(*args)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    def submit(self, prompts: Path, tokens: int, partitions: str, workers: int) -> None:
        self.checked(
            "farm", "submit", "-i", prompts, "-m", "demo", "-o", self.farm, "--max-new-tokens", str(tokens),
            "--partitions", partitions, "--workers", str(workers), "--lease", "6", "--commit", "1", "--stats",
            "--cpus", "4", *ENGINE,
        )  # fmt: skip

    def happen(self, kind: str, lives: list[Life]) -> None:
        """Let one event happen, if there is something for it to happen to."""
        life = self.rng.choice(lives) if lives else None
        if kind == "lose node":
            if not self._lose_node():
                return
        elif life is None:
            return
        elif kind == "preempt":
            hog = (
                "--partition=main",
                "--time=1",
                f"--nodelist={self.cluster.nodes[-1]}",
                "--exclusive",
                "--wrap=sleep 3",
            )
            self.cluster.run("sbatch", "--output=/dev/null", *hog)
        elif kind == "requeue":
            if (
                life.begin.place.job is None
                or subprocess.run(
                    ["scontrol", "requeue", life.begin.place.job],
                    env={**os.environ, **self.cluster.environment},
                    capture_output=True,
                    check=False,
                ).returncode
            ):
                return
        elif kind == "duplicate":
            self._duplicate(life)
        elif not self._strike(kind, int(life.begin.place.process.partition("@")[0])):
            return
        self.events[kind] += 1

    def _strike(self, kind: str, pid: int) -> bool:
        try:
            if kind == "kill":
                os.kill(pid, signal.SIGKILL)
            elif kind == "kill supervisor":
                stat = Path(f"/proc/{pid}/stat").read_text()
                os.kill(int(stat[stat.rindex(")") + 2 :].split()[1]), signal.SIGKILL)
            elif kind == "term":
                os.kill(pid, signal.SIGTERM)
            else:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        except (OSError, ValueError):
            return False
        return True

    def _duplicate(self, life: Life) -> None:
        """The same job's worker once more, as an operator's mistake or a confused site may start it."""
        place = life.begin.place
        job = {"SLURM_JOB_ID": (place.job or "1").partition("_")[0], "SLURMD_NODENAME": place.node}
        env = environment(self.home, **self.cluster.environment, **job)
        line = command("farm", "worker", self.farm, "--partition", place.partition)
        self.duplicates.append(
            subprocess.Popen(
                line, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        )

    def _lose_node(self) -> bool:
        """A node's daemon is gone: what ran there goes on unseen, and Slurm starts it again elsewhere."""
        node = self.rng.choice(self.cluster.nodes)
        pid = self.cluster.daemon(f"slurmd.{node}")
        if pid is not None and not self.lost_nodes:
            os.kill(pid, signal.SIGKILL)
            self.lost_nodes.append((time.monotonic() + 35, node))
            return True
        return False

    def mend(self) -> None:
        """Nodes that were away for long enough come back."""
        for when, node in list(self.lost_nodes):
            if time.monotonic() > when:
                self.lost_nodes.remove((when, node))
                with contextlib.suppress(AssertionError):
                    self.cluster.start_node(node)

    def has_jobs(self) -> bool:
        return bool(self.cluster.run("squeue", "--noheader", "--me"))

    def end_duplicates(self) -> None:
        for process in self.duplicates:
            if process.poll() is None:
                process.terminate()
            process.wait()


def rampage(chaos: Chaos, events: int, pause: float, until: float, rare: tuple[str, ...] = RARE) -> bool:
    """Events until there were enough, then wait for the end. Returns whether the farm is complete. Asserts, at every
    look, that the status says no more than is true."""
    spool = Spool(chaos.farm)
    ledger = Ledger(spool)
    before = 0
    last_resume = time.monotonic()
    while time.monotonic() < until:
        found = status_of(ledger)
        assert before <= found.done <= found.rows
        before = found.done
        if found.complete:
            assert found.done == found.rows
            return True
        lives = [life for life in ledger.lives.values() if life.end is None and process_runs(life.begin.place.process)]
        if sum(chaos.events.values()) < events:
            often = chaos.rng.random() < 0.9 or not rare
            chaos.happen(chaos.rng.choice(KINDS if often else rare), lives)
        chaos.mend()
        if time.monotonic() - last_resume > 8:
            last_resume = time.monotonic()
            chaos.run("farm", "resume", chaos.farm)  # whoever is there stays; whoever is missing is submitted again
        time.sleep(pause)
    return False


def write_prompts(file: Path, count: int) -> None:
    """Prompts that are all different."""
    rng = random.Random(4)
    words = [
        "how",
        "do",
        "I",
        "list",
        "my",
        "jobs",
        "on",
        "Slurm",
        "what",
        "does",
        "sinfo",
        "show",
        "a",
        "partition",
        "node",
        "serve",
        "model",
        "cat",
        "sat",
        "lake",
        "fox",
    ]
    lines = (f"{number} {' '.join(rng.choices(words, k=rng.randrange(3, 9)))}\n" for number in range(count))
    file.write_text("".join(lines))


def reference(chaos: Chaos, prompts: Path, tokens: int) -> dict[int, str]:
    """What one undisturbed process answers."""
    out = chaos.home / "reference.jsonl"
    chaos.checked("generate", "demo", "-i", prompts, "-o", out, "--max-new-tokens", str(tokens), *ENGINE)
    return {row["id"]: row["text"] for row in map(json.loads, out.read_text().splitlines())}


def check(chaos: Chaos, truth: dict[int, str]) -> None:
    """Exactly the rows, each once, with the text of the undisturbed run."""
    output = chaos.farm / "output.jsonl"
    chaos.checked("farm", "merge", chaos.farm, "--json")
    found, checked = audit(Spool(chaos.farm), output)
    assert found.sound
    assert found.complete
    assert checked is not None
    assert checked.sound
    lines = output.read_text().splitlines()
    assert len(lines) == len(truth)
    assert {row["id"]: row["text"] for row in map(json.loads, lines)} == truth
    print(found, checked, dict(chaos.events), sep="\n")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--pause", type=float, default=0.3)
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--folder", type=Path, required=True)
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    asked.folder.mkdir(exist_ok=True)
    state, prompts = asked.folder / "events.json", asked.folder / "prompts.txt"
    cluster = slurm.start(count=4, cpus=8)
    chaos = Chaos(cluster, asked.folder, random.Random(time.time()))
    try:
        if state.exists():
            chaos.events.update(json.loads(state.read_text()))
            for file in (chaos.farm / "jobs").glob("*.json"):
                file.unlink()  # jobs of a cluster that is no more
        else:
            write_prompts(prompts, asked.prompts)
        chaos.submit(prompts, asked.tokens, "main:4,low:2,brief:2", 8)
        done = rampage(chaos, asked.events, asked.pause, until)
        state.write_text(json.dumps(chaos.events))
        print("complete" if done else "not complete", sum(chaos.events.values()), dict(chaos.events), flush=True)
        print(chaos.run("farm", "status", chaos.farm).stdout.decode(), flush=True)
    finally:
        chaos.end_duplicates()
        cluster.stop()
    if done and time.monotonic() + 40 < until:
        check(chaos, reference(chaos, prompts, asked.tokens))
        print(chaos.run("farm", "report", chaos.farm).stderr.decode())
        print("exactly once")
    sys.exit(0 if done else 1)


if __name__ == "__main__":
    main()
