"""What Slurm refuses, in its own words, with the cure."""

from __future__ import annotations

import getpass
import re
import subprocess
from collections.abc import Callable, Sequence

from penstock.errors import EnvironmentFault, PenstockError, ResourceError, UsageError

_NOISE = re.compile(r"^(sbatch|srun|scancel|squeue|scontrol|sbcast|sacct)?:?\s*(error|fatal):\s*")
_TRY_AGAIN = "Try again in a minute; `scontrol ping` says how the controller is."


def refused(program: str, words: str, arguments: Sequence[str] = ()) -> PenstockError:
    """The error for a command of Slurm that failed: its words, and what to type next."""
    lines = list(dict.fromkeys(_NOISE.sub("", line.strip()) for line in words.splitlines() if line.strip()))
    text = lines[-1] if lines else "it said nothing"
    said = " ".join(lines)[:300]
    for pattern, kind, cure in _CURES:
        if re.search(pattern, said, re.IGNORECASE):
            return kind(f"Slurm refuses: {text}", f"Its words: {said}" if said != text else "", cure())
    return EnvironmentFault(f"`{program}` failed: {text}", f"Its words: {said}" if said != text else "")


def _ask(*command: str) -> list[str]:
    """Lines of an informative command; none when it fails, for an error must not cause another."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted({line.strip() for line in done.stdout.splitlines() if line.strip()}) if done.returncode == 0 else []


def _partitions() -> str:
    names = [name.rstrip("*") for name in _ask("sinfo", "--noheader", "--format=%P")]
    return f"Partitions here: {', '.join(names)}. Give one with --partition." if names else "`sinfo` lists partitions."


def _accounts() -> str:
    mine = ("show", "associations", "where", f"user={getpass.getuser()}", "format=account")
    rows = _ask("sacctmgr", "--noheader", "--parsable2", *mine)
    known = f"Your accounts: {', '.join(rows)}. " if rows else ""
    return f"{known}Give yours with --account; `sacctmgr show associations user=$USER` lists them."


def _nodes() -> str:
    rows = _ask("sinfo", "--noheader", "--format=%P: %c cores, %m MB, %G")
    shown = "; ".join(row.replace("(null)", "no GPU").replace("*:", ":") for row in rows[:6])
    return f"Nodes here: {shown}." if shown else "`sinfo -o '%P %c %m %G'` shows what the nodes have."


def _limits() -> str:
    rows = _ask("sinfo", "--noheader", "--format=%P at most %l")
    return f"Time limits: {', '.join(row.replace('*', '') for row in rows)}." if rows else "Ask for less with --time."


def _always(text: str) -> Callable[[], str]:
    return lambda: text


# (Slurm's words, what kind of error it is, the cure); the first that fits
_CURES: tuple[tuple[str, type[PenstockError], Callable[[], str]], ...] = (
    (r"invalid partition|partition name specified", UsageError, _partitions),
    (r"invalid account|account/partition", UsageError, _accounts),
    (r"invalid qos|qos specification", UsageError, _always("Give another with --qos; `sacctmgr show qos` lists them.")),
    (r"time limit.*invalid|invalid time limit|time limit specification", UsageError, _limits),
    (r"generic resource|gres", UsageError, _nodes),
    (r"node configuration is not available|node count|more processors|memory.*satisfied|CPU count", UsageError, _nodes),
    (r"constraint|feature", UsageError, _always("`sinfo -o '%P %f'` lists the features that --constraint can name.")),
    (r"job dependency", UsageError, _always("The job named in --dependency is gone; `squeue --me` lists yours.")),
    (
        r"policy|QOSMax|submit.*limit|too many jobs|AssocMaxSubmit",
        ResourceError,
        _always("You have reached a limit of the site: wait for a job to end, or ask for fewer cores, GPUs or hours."),
    ),
    (
        r"quota|no space left",
        ResourceError,
        _always("Free some space, or set PENSTOCK_JOBS_DIR to another file system."),
    ),
    (r"contact slurm controller|socket timed out|connection refused|timed out", EnvironmentFault, _always(_TRY_AGAIN)),
    (r"access/permission denied|user not permitted", EnvironmentFault, _always("Ask the site for access.")),
    (r"invalid job id", UsageError, _always("`penstock jobs` lists your servers, `squeue --me` your jobs.")),
)
