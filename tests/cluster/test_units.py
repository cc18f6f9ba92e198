"""Parts of the cluster code that need no Slurm."""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.cluster import fleet, registry, script, slurm, words
from penstock.cluster.refusals import refused
from penstock.cluster.registry import Order
from penstock.cluster.staging import copying
from penstock.cluster.staging.manifest import Manifest
from penstock.cluster.staging.store import Store
from penstock.cluster.staging.strategies import Strategy, Timing, _predicted, candidates
from penstock.errors import EnvironmentFault, ResourceError, UsageError

KEY = "0123456789abcdef01234567"


@pytest.fixture
def jobs_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENSTOCK_JOBS_DIR", str(tmp_path / "jobs"))
    return tmp_path / "jobs"


def test_one_of_many_gets_a_name(jobs_directory: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: registry.claim("demo", None), range(16)))
    won = [launch for launch in found if launch is not None]
    assert [launch.path for launch in won] == [jobs_directory / "demo" / "0001"]


def test_a_launch_keeps_its_secrets_and_old_launches_go(jobs_directory: Path) -> None:
    previous = None
    for _ in range(registry.KEPT + 2):
        launch = registry.claim("demo", previous)
        assert launch is not None
        registry.fill(launch, Order("demo", str(launch.key)), "#!/bin/bash\n")
        previous = launch
    kept = registry.launches("demo")
    assert [launch.path.name for launch in kept] == ["0003", "0004", "0005", "0006", "0007"]
    keys = {launch.key.read_text() for launch in kept}
    assert len(keys) == registry.KEPT
    for path in jobs_directory.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_directory_of_others_is_refused(jobs_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    jobs_directory.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentFault, match="not a directory of yours"):
        registry.claim("demo", None)


def test_a_submission_that_was_broken_off_is_not_waited_for(jobs_directory: Path) -> None:
    launch = registry.claim("ghost", None)
    assert launch is not None
    with pytest.raises(EnvironmentFault, match="was not ready within"):  # it may yet get its job
        fleet.wait(launch, print, patience=0.1)
    os.utime(launch.path, (0, 0))
    with pytest.raises(EnvironmentFault, match="was never submitted"):
        fleet.wait(launch, print, patience=20)
    with pytest.raises(EnvironmentFault, match="was never submitted"):
        fleet.find("ghost", {})


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1-8b-instruct"),
        ("org/Model@v1.0", "model"),
        ("/models/My Model/", "my-model"),
        ("demo", "demo"),
        ("/", "model"),
    ],
)
def test_names_made_of_models(model: str, name: str) -> None:
    assert registry.check_name(registry.name_for(model)) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "-x", "a b", "x" * 64, "ä"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(UsageError):
        registry.check_name(name)


def test_slurm_times() -> None:
    assert [slurm.seconds(text) for text in ("9:58", "1:00:00", "2-03:04:05", "UNLIMITED", "INVALID")] == [
        598, 3600, 183845, None, None,
    ]  # fmt: skip
    assert [script.warning_seconds(25, limit) for limit in (None, 36000, 60, 10)] == [60, 60, 15, 5]


@pytest.mark.parametrize(
    ("said", "kind", "cure"),
    [
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
         UsageError, "--account"),
        ("sbatch: error: Batch job submission failed: Invalid qos specification", UsageError, "--qos"),
        ("sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)",
         UsageError, "--time"),
        ("sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates "
         "accounting/QOS policy (job submit limit, user's size and/or time limits)", ResourceError, "limit"),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", EnvironmentFault,
         "Try again"),
        ("sbatch: error: Unable to open file: Disk quota exceeded", ResourceError, "PENSTOCK_JOBS_DIR"),
        ("sbatch: error: something new", EnvironmentFault, "something new"),
    ],
)  # fmt: skip
def test_slurms_words_and_the_cure(said: str, kind: type[Exception], cure: str) -> None:
    """Texts of Slurm for refusals that the test cluster, which has no accounting, cannot give."""
    error = refused("sbatch", said)
    assert type(error) is kind
    assert said.rpartition("error: ")[2].rpartition("failed: ")[2] in str(error)
    assert cure in str(error)
    assert len(str(error).splitlines()) <= 3


def test_states_and_reasons_in_words() -> None:
    assert "--mem" in words.ending("OUT_OF_MEMORY")
    assert "--renew" in words.ending("TIMEOUT")
    assert "node failed" in words.ending("NODE_FAIL")
    assert "signal 9" in words.ending("FAILED", -9)
    assert "other jobs come first" in words.pending("Priority", "1")
    assert "QOS" in words.pending("QOSMaxGRESPerUser", "1")
    assert "scontrol release 7" in words.pending("JobHeldUser", "7")
    assert words.hopeless("PartitionTimeLimit")
    assert not words.hopeless("Resources")


def test_a_staged_model_goes_with_its_last_user(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.open()
    other = Store(tmp_path)
    assert store.lock(KEY)
    assert not other.lock(KEY)
    store.part(KEY).mkdir()
    (store.part(KEY) / "file").write_text("x")
    staged = store.commit(KEY)
    store.use(KEY, "1")
    store.use(KEY, "2")
    store.unlock(KEY)
    assert other.lock(KEY)
    other.unlock(KEY)
    assert other.whole(KEY) == staged
    assert not store.release(KEY, "1", living=["2"])
    assert staged.exists()
    assert store.release(KEY, "3", living=[])  # job 2 has died without a word
    assert not list(tmp_path.iterdir())


def test_a_directory_that_somebody_made_before_us_is_not_used(tmp_path: Path) -> None:
    squatted = Store(tmp_path)
    squatted.path.mkdir()
    squatted.path.chmod(0o777)
    with pytest.raises(PermissionError):
        squatted.open()


@pytest.mark.parametrize("fanout", [1, 2, 4])
def test_leaders_relay_what_the_first_reads(tmp_path: Path, fanout: int) -> None:
    """Five leaders in threads: only the first one opens the source, all have its bytes."""
    source = tmp_path / "w.safetensors"
    source.write_bytes(os.urandom(3 * 2**20 + 17))
    manifest = Manifest(KEY, ("w.safetensors",), (str(source),), (source.stat().st_size,))
    elsewhere = Manifest(KEY, manifest.names, ("/nowhere",), manifest.sizes)
    pieces, count = manifest.pieces(), 5
    posts = [copying.Post() for _ in range(count)]
    folders = [tmp_path / str(i) for i in range(count)]

    def lead(mine: int) -> None:
        above = None if mine == 0 else copying.join(["127.0.0.1"], posts[(mine - 1) // fanout].port, "token")
        below = posts[mine].accept(len([i for i in range(1, count) if (i - 1) // fanout == mine]), "token")
        copying.copy_relayed(manifest if mine == 0 else elsewhere, pieces, folders[mine], above, below)

    for folder in folders:
        folder.mkdir()
        copying.create_files(manifest, folder)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lead, range(count)))
    for folder in folders:
        assert (folder / "w.safetensors").read_bytes() == source.read_bytes()
        assert [copying.checksum(folder / "w.safetensors", p) for p in pieces] == [
            copying.checksum(source, p) for p in pieces
        ]


def test_a_stranger_gets_nothing_from_a_leader() -> None:
    post = copying.Post()
    thread = threading.Thread(target=lambda: found.extend(post.accept(1, "token")))
    found: list[socket.socket] = []
    thread.start()
    with pytest.raises(OSError):  # noqa: PT011 (closed or reset)
        copying.join(["127.0.0.1"], post.port, "nekot")
    assert copying.join(["127.0.0.1"], post.port, "token")
    thread.join(10)
    assert len(found) == 1


def test_strategies_that_differ() -> None:
    def names(nodes: int) -> list[str]:
        return [strategy.name for strategy in candidates(nodes, all_nodes=False)]

    assert [names(nodes) for nodes in (1, 2, 3, 4)] == [
        ["direct"], ["direct", "chain"], ["direct", "chain", "broadcast"], ["direct", "chain", "broadcast", "tree"],
    ]  # fmt: skip


def test_predictions_leave_the_first_round_out() -> None:
    way = Strategy("way", "")
    assert _predicted([Timing(way, 0.5, 10)], 1000) == pytest.approx(50)
    assert _predicted([Timing(way, 0.5, 10), Timing(way, 0.4, 40), Timing(way, 0.4, 60)], 1000) == pytest.approx(8)
