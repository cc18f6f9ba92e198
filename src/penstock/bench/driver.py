"""The engines that Penstock is compared with: where they are, and each one's process behind its driver.

What goes over the pipes is told in benchmarks/rivals/protocol.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.devices.memory import available_bytes
from penstock.errors import EnvironmentFault, PenstockError, ResourceError, UsageError

HOME = "penstock"  # the engine that the others are measured against
_STOP_SECONDS = 5.0


@dataclass(frozen=True)
class Engine:
    """One engine in one format, and how its driver is started. openmp: bind its threads as Penstock's are bound."""

    name: str
    format: str
    python: str
    driver: str
    openmp: bool = False

    def __str__(self) -> str:
        return f"{self.name}:{self.format}"


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """What benchmarks/make_rivals.py wrote. Raises EnvironmentFault when it is not there."""
    file = folder / "rivals.json"
    try:
        manifest: dict[str, dict[str, Any]] = json.loads(file.read_text())
    except OSError:
        raise EnvironmentFault(
            f"There are no engines to compare with in {folder}.",
            "They live in environments of their own, which a script of the repository makes.",
            "python benchmarks/make_rivals.py",
        ) from None
    except ValueError as error:
        raise EnvironmentFault(f"{file} is damaged.", str(error), "python benchmarks/make_rivals.py") from None
    return manifest


def choose(manifest: dict[str, dict[str, Any]], asked: Sequence[str]) -> list[Engine]:
    """The engines that were asked for as NAME or NAME:FORMAT, or all of them. Raises UsageError."""
    chosen: list[Engine] = []
    for text in asked or manifest:
        name, _, form = text.partition(":")
        if name not in manifest:
            raise UsageError(f"There is no engine {name!r}.", "", f"There are: {', '.join(manifest)}")
        entry = manifest[name]
        python = sys.executable if name == HOME else entry["python"]
        formats = [form] if form else entry["formats"]  # a driver may know more of them than the manifest lists
        chosen += [Engine(name, one, python, entry["driver"], entry["openmp"]) for one in formats]
    return list(dict.fromkeys(chosen))


class Driver:
    """A running driver. Close it at the end."""

    def __init__(self, engine: Engine, model: Path, cache: Path, threads: int) -> None:
        self.engine = engine
        converted = cache / engine.name / engine.format
        setup = {"model": str(model), "cache": str(converted), "format": engine.format, "threads": threads}
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        if engine.openmp:
            environment |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
        if engine.name != HOME:
            environment.pop("PYTHONPATH", None)  # of this environment, not of theirs
        self._log = cache / f"{engine}.log"
        cache.mkdir(parents=True, exist_ok=True)
        first = json.dumps(setup) + "\n"
        with self._log.open("w") as log:
            prepared = subprocess.run(
                [engine.python, engine.driver, "prepare"],
                input=first,
                text=True,
                stdout=log,
                stderr=log,
                env=environment,
            )
        if prepared.returncode != 0:
            raise self._failed("could not convert the model")
        _check_room(engine, model, converted)
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [engine.python, engine.driver, "run"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # Ctrl-C is for us, who then end it
            )
        try:
            ready = self._ask(first)
        except BaseException:
            self.close()
            raise
        self.version, self.load_seconds = str(ready["ready"]), float(ready["seconds"])
        self.weight_bytes: float | None = ready["weight_bytes"]

    def run(self, prompts: list[list[int]], new: int) -> dict[str, float]:
        """Seconds and tokens of one job: first, first_tokens, total, tokens. Raises PenstockError when it fails."""
        answer = self._ask(json.dumps({"prompts": prompts, "new": new}) + "\n")
        if "error" in answer:
            raise PenstockError(f"{self.engine} failed", str(answer["error"])[:300], f"Its log: {self._log}")
        if answer["tokens"] != len(prompts) * new:
            raise PenstockError(f"{self.engine} made {answer['tokens']} tokens instead of {len(prompts) * new}")
        return answer

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None  # noqa: S101 (pipes were asked for)
        assert self._process.stdout is not None  # noqa: S101
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
            found: dict[str, Any] = json.loads(answer)
        except (OSError, ValueError):
            raise self._failed("ended unexpectedly") from None
        return found

    def _failed(self, what: str) -> PenstockError:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return PenstockError(f"{self.engine} {what}", lines[-1][:300] if lines else "", f"Its log: {self._log}")

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _check_room(engine: Engine, model: Path, converted: Path) -> None:
    """Refuse to start an engine whose weights do not fit beside those that run already."""
    folder = converted if any(converted.glob("*.*")) else model
    weights = max((file.stat().st_size for file in folder.rglob("*") if file.is_file()), default=0)
    need, have = int(1.3 * weights) + 2**29, available_bytes()
    if need > have:
        raise ResourceError(
            f"{engine} does not fit beside the engines that are loaded.",
            f"It needs about {need / 2**30:.1f} GiB, and {have / 2**30:.1f} GiB are free.",
            "Name fewer engines with --engine, and compare in several runs.",
        )
