"""The checks of `penstock doctor`. Each is a function that returns what it found; none changes anything."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from penstock import __version__
from penstock.devices.memory import available_bytes
from penstock.devices.places import nodes
from penstock.devices.threads import bind_threads, usable_cores
from penstock.errors import PenstockError
from penstock.hub import cache

PACKAGES = ("transformers", "tokenizers", "safetensors", "huggingface_hub", "msgspec", "uvicorn")
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd", "i8mm", "bf16")
SLURM = ("sbatch", "srun", "squeue", "sacct", "scancel")
GIB = 1024**3
SHM = "/dev/shm"  # noqa: S108 (looked at, not written)
MANY_FILES = 4096  # open files: one for each connection


@dataclass(frozen=True)
class Check:
    """One line of the report. cure: what to do about a warning or a failure."""

    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    cure: str = ""


def run_checks(quick: bool, threads: int | None) -> Iterator[Check]:
    """All checks in order; one that breaks is a failure of its own and does not stop the others."""
    cores = usable_cores()  # before torch is imported: its threads are bound, and this one with them
    bind_threads(threads)
    checks: dict[str, Callable[[], Check]] = {
        "penstock": check_penstock,
        "torch": check_torch,
        "packages": check_packages,
        "processor": check_processor,
        "cores": lambda: check_cores(cores),
        "memory": check_memory,
        "gpus": check_gpus,
        "cache": check_cache,
        "token": check_token,
        "temporary": check_temporary,
        "shm": check_shm,
        "files": check_files,
        "slurm": check_slurm,
    }
    if not quick:
        checks["generation"] = lambda: check_generation(threads)
    for name, check in checks.items():
        try:
            yield check()
        except Exception as error:
            yield Check(name, "fail", f"the check itself failed: {type(error).__name__}: {error}", "Report this.")


def check_penstock() -> Check:
    """Our own version, Python's and the system's."""
    text = f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    return Check("penstock", "ok", text)


def check_torch() -> Check:
    """PyTorch, imported for real: a broken installation often shows only then."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Check("torch", "fail", str(error).splitlines()[0], "Install it: pip install 'torch>=2.11'")
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "for the processor"
    if getattr(torch.version, "hip", None):
        built = f"ROCm {torch.version.hip}"
    return Check("torch", "ok", f"{torch.__version__}, built {built}")


def check_packages() -> Check:
    """The other packages, by their metadata."""
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Check("packages", "fail", f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    return Check("packages", "ok", ", ".join(found))


def check_processor() -> Check:
    """The instructions that make matrix products fast."""
    model, flags = "", set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
            elif key.strip() == "model name" and not model:
                model = value.strip()
    except OSError:
        pass
    present = [feature for feature in FEATURES if feature in flags]
    text = (
        f"{model or platform.processor() or platform.machine()}: {', '.join(present) or 'no vector instructions known'}"
    )
    if len(nodes()) > 1:
        text += f"; {len(nodes())} nodes of memory (--cpus node0 keeps a process to one and its memory)"
    if not {"avx2", "asimd"} & flags:
        return Check("processor", "warn", text, "It will be slow; take a machine with AVX2 or better.")
    return Check("processor", "ok", text)


def check_cores(ours: int) -> Check:
    """Cores that the affinity mask and the cgroup leave us, against the processors of the machine."""
    all_of_them = os.cpu_count() or 1
    text = f"{ours} usable of {all_of_them} processors (affinity and cgroup counted)"
    if ours == 1 < all_of_them:
        return Check("cores", "warn", text, "Ask for more: sbatch --cpus-per-task=N, or taskset -c.")
    return Check("cores", "ok", text)


def check_memory() -> Check:
    """Memory that this process may still take."""
    free = available_bytes()
    text = f"{free / GIB:.1f} GiB available (machine, cgroup and ulimit -v counted)"
    if free < GIB:
        return Check("memory", "warn", text, "Enough for the demo only; sbatch --mem=N asks for more.")
    return Check("memory", "ok", text)


def check_gpus() -> Check:
    """GPUs that torch sees, and those that are there but not seen."""
    import torch

    from penstock.devices import cuda

    found = cuda.cards()
    if found:
        free = [cuda.free_and_total(torch.device("cuda", card.index))[0] / GIB for card in found]
        return Check("gpus", "ok", "; ".join(f"{card}, {n:.1f} GiB free" for card, n in zip(found, free, strict=True)))
    if Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists():
        return Check(
            "gpus",
            "warn",
            f"a GPU is here, but torch cannot use it: {cuda.why_none()}",
            "Install torch's CUDA or ROCm build; check the driver.",
        )
    return Check("gpus", "ok", "none; the processor does the work")


def check_cache() -> Check:
    """The hub cache: where, whether it can be written, how much space is left."""
    folder = cache.cache_folder()
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    offline = ", offline by HF_HUB_OFFLINE" if cache.is_offline() else ""
    text = f"{folder}, {len(cache.names())} models, {free / GIB:.1f} GiB free{offline}"
    if not os.access(existing, os.W_OK | os.X_OK):
        return Check("cache", "warn", f"{text}, not writable", "Models can be read but not downloaded; set HF_HOME.")
    if free < 2 * GIB:
        return Check("cache", "warn", text, "Set HF_HOME to a folder with more space.")
    return Check("cache", "ok", text)


def check_token() -> Check:
    """Whether a hub token is there; never its value."""
    source = cache.token_source()
    if source is None:
        return Check("token", "ok", "none; only gated and private models need one (hf auth login)")
    if not source.startswith("$") and os.stat(source).st_mode & 0o077:
        return Check("token", "warn", f"{source}, readable by others", f"chmod 600 {source}")
    return Check("token", "ok", f"found in {source}")


def check_temporary() -> Check:
    """The folder for temporary files."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        return Check("temporary", "fail", str(error.strerror), "Set TMPDIR to a folder that can be written.")
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {free / GIB:.1f} GiB free"
    return Check("temporary", "ok", text) if free > GIB // 4 else Check("temporary", "warn", text, "Set TMPDIR.")


def check_shm() -> Check:
    """The RAM disk, where models can be staged and processes share memory."""
    try:
        usage = shutil.disk_usage(SHM)
    except OSError:
        return Check("shm", "warn", f"{SHM} is not there", "Containers need --shm-size=1g or --ipc=host.")
    text = f"{SHM}, {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < GIB // 16:
        return Check("shm", "warn", text, f"Remove files in {SHM}, or give the container --shm-size=1g.")
    return Check("shm", "ok", text)


def check_files() -> Check:
    """Open files: one for each connection of a server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft:,} open files, at most {hard:,}"
    if hard < MANY_FILES:
        return Check("files", "warn", text, f"Ask for a higher limit (ulimit -n {MANY_FILES}) to serve many clients.")
    return Check("files", "ok", text)


def check_slurm() -> Check:
    """Slurm's commands, and the job we are in."""
    found = [name for name in SLURM if shutil.which(name)]
    if not found:
        return Check("slurm", "ok", "not here: no cluster, or its module is not loaded")
    job = f", inside job {os.environ['SLURM_JOB_ID']}" if os.environ.get("SLURM_JOB_ID") else ""
    missing = [name for name in SLURM if name not in found]
    if missing:
        return Check("slurm", "warn", f"only {', '.join(found)}{job}", "Load the site's slurm module.")
    return Check("slurm", "ok", f"{', '.join(found)}{job}")


def check_generation(threads: int | None) -> Check:
    """A few tokens from the bundled model, through everything that a real run goes through."""
    from penstock.batch.local import generate_rows
    from penstock.batch.parameters import Parameters
    from penstock.batch.prompts import Prompter
    from penstock.batch.rows import Row
    from penstock.cli.engine import start_engine
    from penstock.hub.snapshot import resolve
    from penstock.text.tokenizer import load_tokenizer

    since = time.monotonic()
    try:
        snapshot = resolve("demo")
        options = {"threads": threads, "max_batch_size": 1, "max_batch_total_tokens": 1024}
        engine = start_engine(snapshot, options, quiet=True)
        rows = [Row(id=1, prompt="What is Slurm?")]
        run = Parameters(max_new_tokens=16, temperature=0, ignore_eos=True)
        steps = list(generate_rows(engine, Prompter(load_tokenizer(snapshot.path)), rows, run))
        result = next(result for step in steps for result in step.results)
    except PenstockError as error:
        return Check("generation", "fail", error.what, " ".join(filter(None, (error.why, error.hint))))
    if result.error or result.generated_tokens != 16:
        return Check("generation", "fail", f"the demo model made {result.generated_tokens} tokens: {result.error}")
    return Check("generation", "ok", f"demo: 16 tokens in {time.monotonic() - since:.1f} s, loading included")
