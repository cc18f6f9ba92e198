"""A real Slurm for tests: munged, slurmctld and a slurmd for each "node", all in one temporary folder.

Needs Debian's packages munge, slurmctld, slurmd and slurm-client, and root. Every node has its own host name and
its own /dev/shm where the machine allows namespaces; all share the network and the other file systems.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "srun", "scancel", "scontrol", "unshare")
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
SHM = "96m"
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={dir}/munge.sock,cred_expire=5
CredType=cred/munge
SlurmctldPidFile={dir}/slurmctld.pid
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmctldLogFile={dir}/slurmctld.log
SlurmdLogFile={dir}/slurmd.%n.log
StateSaveLocation={dir}/state
SlurmdSpoolDir={dir}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,sched_min_interval=100000,bf_interval=2,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=5
CompleteWait=0
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=30
PropagateResourceLimits=NONE
{nodes}
PartitionName=DEFAULT State=UP MaxTime=1:00:00 DefaultTime=10:00 DefMemPerCPU=100
PartitionName=main Nodes=ALL Default=YES PriorityTier=10
PartitionName=low Nodes={last} PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=brief Nodes=ALL PriorityTier=10 MaxTime=1:00
"""


def obstacle() -> str:
    """Why a cluster cannot be started here; empty when it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install munge slurmctld slurmd slurm-client"
    return "" if os.getuid() == 0 else "slurmctld and slurmd need root"


@dataclass
class Cluster:
    """A running cluster. shared: a folder that every user may enter."""

    directory: Path
    nodes: list[str]
    namespaces: bool

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.directory / "slurm.conf"), "PATH": PATH}

    def run(self, *command: str, timeout: float = 30) -> str:
        """What a command of Slurm prints."""
        env = {**os.environ, **self.environment}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def wait_state(self, job: str, *states: str, seconds: float = 30) -> str:
        """Until a job is in one of these states."""
        end = time.monotonic() + seconds
        while True:
            state = self.run("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")
            if state in states:
                return state
            why = self.run("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%r %S")
            assert time.monotonic() < end, f"job {job} is {state} ({why}), not {states}"
            time.sleep(0.2)

    def stop(self) -> None:
        """End the jobs, then exactly the daemons that were started."""
        end = time.monotonic() + 15
        while (jobs := self.run("squeue", "--noheader", "--format=%i").split()) and time.monotonic() < end:
            self.run("scancel", *jobs)
            time.sleep(0.3)
        pids = [self.daemon(name) for name in (*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged")]
        for pid in filter(None, pids):
            os.kill(pid, signal.SIGTERM)
        for pid in filter(None, pids):
            _gone(pid)
        shutil.rmtree(self.directory, ignore_errors=True)

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        slurmd = ["slurmd", "-N", node, "-f", str(self.directory / "slurm.conf")]
        if self.namespaces:
            inner = f"mount --make-rprivate /; mount -t tmpfs -o size={SHM},mode=1777 none /dev/shm; hostname {node}"
            slurmd = ["unshare", "--mount", "--uts", "sh", "-c", f'{inner}; exec "$@"', "sh", *slurmd]
        _daemon(self, *slurmd)

    def daemon(self, name: str) -> int | None:
        """The process of a daemon (slurmctld, munged, slurmd.NODE), if it runs."""
        try:
            pid = int((self.directory / f"{name}.pid").read_text())
            return pid if Path(f"/proc/{pid}/comm").read_text().strip() == name.partition(".")[0] else None
        except (OSError, ValueError):
            return None


def start(count: int, cpus: int) -> Cluster:
    """A cluster of so many nodes; every daemon answers when it returns."""
    directory = Path(tempfile.mkdtemp(prefix="pst-", dir="/tmp"))  # a socket's path must be short
    directory.chmod(0o755)
    nodes = [f"pn{i}" for i in range(1, count + 1)]
    namespaces = _run_quietly("unshare", "--mount", "--uts", "sh", "-c", "mount -t tmpfs none /dev/shm && hostname x")
    host = socket.gethostname()
    ports = _free_ports(count + 1)
    lines = [
        f"NodeName={node} NodeHostname={node if namespaces else host} NodeAddr=127.0.0.{20 + i} Port={ports[i]} "
        f"CPUs={cpus} RealMemory=8000 State=UNKNOWN" + (" Gres=gpu:toy:1" if i == 1 else "")
        for i, node in enumerate(nodes, 1)
    ]
    text = CONFIGURATION.format(host=host, port=ports[0], dir=directory, nodes="\n".join(lines), last=nodes[-1])
    (directory / "slurm.conf").write_text(text)
    (directory / "gpu0").symlink_to("/dev/null")
    (directory / "gres.conf").write_text(f"NodeName={nodes[0]} Name=gpu Type=toy File={directory}/gpu0\n")
    (directory / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    cluster = Cluster(directory, nodes, namespaces)
    try:
        _start_daemons(cluster)
    except BaseException:
        cluster.stop()
        raise
    return cluster


def _start_daemons(cluster: Cluster) -> None:
    directory = cluster.directory
    key = directory / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    _daemon(
        cluster, "munged", "--force", "--num-threads=2", f"--key-file={key}", f"--socket={directory}/munge.sock",
        f"--pid-file={directory}/munged.pid", f"--log-file={directory}/munged.log",
        f"--seed-file={directory}/munge.seed",
    )  # fmt: skip
    _daemon(cluster, "slurmctld", "-f", str(directory / "slurm.conf"))
    for node in cluster.nodes:
        (directory / f"spool.{node}").mkdir()
        cluster.start_node(node)
    end = time.monotonic() + 30
    while cluster.run("sinfo", "--noheader", "--partition=main", "--format=%T", timeout=15) != "idle":
        assert time.monotonic() < end, cluster.run("sinfo", "-N", "-l")
        time.sleep(0.2)


def _daemon(cluster: Cluster, *command: str) -> None:
    """Start a program that goes into the background by itself; what a slurmd has in its environment, jobs inherit."""
    env = {"PATH": PATH, "LANG": "C.UTF-8", "HOME": "/root", "SLURM_CONF": str(cluster.directory / "slurm.conf")}
    log = cluster.directory / "daemons.log"
    with log.open("ab") as out:
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, timeout=30, check=False, cwd="/"
        )
    assert done.returncode == 0, f"{command}:\n{log.read_text()}"


def _run_quietly(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(sock.getsockname()[1]) for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


def _gone(pid: int) -> None:
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    if Path(f"/proc/{pid}").exists():
        os.kill(pid, signal.SIGKILL)
