"""What Slurm's reasons and states mean for a server, and what helps."""

from __future__ import annotations

# reason of a pending job: what it means and what helps
_REASONS = {
    "Priority": "other jobs come first",
    "Resources": "the nodes it asks for are busy",
    "BeginTime": "it was put back into the queue and may start again in a moment",
    "Dependency": "it waits for another job, as asked",
    "DependencyNeverSatisfied": "the job it waits for will never do what it waits for: stop it",
    "PartitionTimeLimit": "it asks for more time than the partition allows and will never start: lower --time",
    "PartitionNodeLimit": "it asks for more nodes than the partition allows and will never start: ask for fewer",
    "PartitionConfig": "it asks for more than the partition allows and will not start: lower --time, --mem or --cpus-per-task",
    "PartitionDown": "the partition is down: try another --partition",
    "PartitionInactive": "the partition is closed: try another --partition",
    "BadConstraints": "no node has what it asks for: change --gpus, --mem or --constraint",
    "ReqNodeNotAvail": "the nodes it needs are down or reserved (a maintenance?): a shorter --time may fit before",
    "Reservation": "it waits for its reservation",
    "NodeDown": "a node it needs is down",
    "JobHeldUser": "it is held: scontrol release {job}",
    "JobHeldAdmin": "the administrators hold it: ask them",
    "InvalidAccount": "the account is not valid here: --account",
    "InvalidQOS": "the QOS is not valid here: --qos",
    "Licenses": "it waits for a licence",
    "Cleaning": "its node is being cleaned after the last run",
}
_PREFIXES = (
    ("QOS", "a limit of its QOS is reached: it starts when another job of the group ends"),
    ("Assoc", "a limit of the account is reached: it starts when another of its jobs ends"),
    ("MaxJobs", "you run as many jobs as you may: it starts when one ends"),
    ("launch failed", "the node could not start it and Slurm holds it: scontrol release {job}"),
    ("user env retrieval failed", "the node could not run your login scripts: check ~/.bashrc, scontrol release {job}"),
)

# state of an ended job: what it means and what helps
_ENDINGS = {
    "OUT_OF_MEMORY": "it took more memory than it asked for: raise --mem (penstock plan MODEL tells how much)",
    "TIMEOUT": "its time was over: ask for more --time, or --renew so that a successor takes over",
    "NODE_FAIL": "its node failed: submit it again (--requeue, the default, lets Slurm do it)",
    "PREEMPTED": "a more important job took its place and the site does not requeue: submit it again",
    "CANCELLED": "it was cancelled",
    "DEADLINE": "its deadline passed",
    "BOOT_FAIL": "its node did not boot: submit it again",
    "FAILED": "it failed",
    "COMPLETED": "it ended by itself",
}


def pending(reason: str, job: str) -> str:
    """Why a job waits, for people: `Priority: other jobs come first`."""
    if not reason:
        return "Slurm has not looked at it yet"
    key = reason.split(",")[0].strip("()")
    meaning = _REASONS.get(key) or next((text for start, text in _PREFIXES if key.startswith(start)), "")
    return f"{reason}: {meaning.format(job=job)}" if meaning else reason


def hopeless(reason: str) -> bool:
    """Whether a pending job with this reason never starts as it is."""
    return reason in (
        "PartitionTimeLimit",
        "PartitionNodeLimit",
        "PartitionConfig",
        "BadConstraints",
        "DependencyNeverSatisfied",
    )


def ending(state: str, exit_code: int | None = None) -> str:
    """How a job ended, for people. exit_code: of the server, negative for a signal."""
    meaning = _ENDINGS.get(state, state.replace("_", " ").lower())
    if exit_code is not None and state in ("FAILED", "COMPLETED", ""):
        meaning = exit_meaning(exit_code)
    return meaning


def exit_meaning(code: int) -> str:
    """What the server's exit code says."""
    if code == -9:
        return "the server was killed (signal 9; out of memory is the usual cause: raise --mem)"
    if code < 0:
        return f"the server died of signal {-code}"
    known = {0: "it ended as asked", 2: "an option is wrong", 3: "the node is not as it must be"}
    known |= {4: "the model cannot be run", 5: "memory or disk do not suffice"}
    return known.get(code, f"the server failed (exit code {code})")
