"""Site profiles: what is read, what is refused, which one is taken, what detection makes of Slurm's words."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

import pytest

from penstock.errors import EnvironmentFault, UsageError
from penstock.plan import site as sites
from penstock.plan.hardware import gpu
from penstock.plan.site import NodeKind, Ports, Site, duration_seconds, load_site, parse_site, read_site, shipped
from penstock.plan.site_detect import detect, name_of, to_toml
from tests.process import check_error, penstock


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PENSTOCK_SITE", "SLURM_CLUSTER_NAME", "CC_CLUSTER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(sites, "SYSTEM_FILE", tmp_path / "system.toml")


@pytest.mark.parametrize("name", shipped())
def test_shipped_profiles_are_valid_and_survive_being_written(name: str) -> None:
    site = load_site(name)
    assert site.name == name
    for kind in site.nodes.values():
        if kind.gpus:
            assert gpu(kind.gpu).memory > 0
    assert parse_site(tomllib.loads(to_toml(site)), Path(site.file)) == site


def test_the_five_sites_are_there() -> None:
    assert {"mila", "narval", "fir", "snellius", "octopus", "generic"} <= set(shipped())
    assert load_site("narval").internet.compute == "no"
    assert load_site("fir").internet.compute == "yes"
    assert load_site("mila").gpu_option(load_site("mila").nodes["a100-80-slice3"], 1) == "--gres=gpu:a100l.3:1"


def test_which_profile_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each of these beats those before it."""
    assert load_site().name == "generic"
    monkeypatch.setenv("CC_CLUSTER", "narval")
    assert load_site().name == "narval"
    (tmp_path / "system.toml").write_text('name = "system"')
    assert load_site().name == "system"
    (tmp_path / "config" / "penstock").mkdir(parents=True)
    (tmp_path / "config" / "penstock" / "site.toml").write_text('name = "mine"')
    assert load_site().name == "mine"
    monkeypatch.setenv("PENSTOCK_SITE", "fir")
    assert load_site().name == "fir"
    (tmp_path / "own.toml").write_text('name = "own"')
    assert load_site(str(tmp_path / "own.toml")).name == "own"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nmae = 'x'", "unknown field"),
        ("[ports]\nbase = -1", "ports.base"),
        ("[internet]\ncompute = 'maybe'", "internet.compute"),
        ("[partitions.a]\nnodes = ['gone']", "names nodes 'gone'"),
        ("[partitions.a]\ntime_limit = 'soon'", "not a time"),
        ("[partitions]\na = 3", "partitions"),
        ("name = ", "not TOML"),
    ],
)
def test_a_wrong_profile_names_the_place(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "site.toml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_site(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_missing_files_and_names(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault):
        load_site(str(tmp_path / "gone.toml"))
    with pytest.raises(UsageError, match="no site profile"):
        load_site("atlantis")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("10:30", 630), ("3:00:00", 10800), ("1-12", 129600), ("2-00:30", 174600), ("7-00:00:00", 604800)],
)
def test_times(text: str, seconds: int) -> None:
    assert duration_seconds(text) == seconds


def test_no_times() -> None:
    assert duration_seconds("UNLIMITED") is None
    assert duration_seconds("1:2:3:4") is None


def test_the_first_port_is_the_guides() -> None:
    assert Ports().first(3430148) == 10148


@pytest.mark.parametrize(
    ("gres", "features", "name"),
    [
        ("a100l", "", "a100-80"),
        ("a100", "", "a100-40"),
        ("a100", "ampere,80gb", "a100-80"),
        ("nvidia_a100-sxm4-80gb", "", "a100-80"),
        ("a100_3g.20gb", "", "a100-40:3g.20gb"),
        ("nvidia_h100_80gb_hbm3_1g.10gb", "", "h100-80:1g.10gb"),
        ("v100d32q", "", "v100-32"),
        ("l40s", "", "l40s"),
        ("l4", "", "l4"),
        ("quadro_rtx_8000", "", "rtx8000"),
        ("mi300x", "", "mi300x"),
        ("fake", "x", ""),
        ("", "", ""),
    ],
)
def test_cards_by_slurms_words(gres: str, features: str, name: str) -> None:
    assert name_of(gres, features) == name


def test_a_profile_cannot_break_out_of_its_file(tmp_path: Path) -> None:
    site = Site(name='x"\ny = 1', title="a\\b", nodes={"k k": NodeKind(gres='"')})
    assert parse_site(tomllib.loads(to_toml(site)), Path()).name == site.name


def test_show_and_list(tmp_path: Path) -> None:
    done = penstock("site", "show", "snellius", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout.decode())["name"] == "snellius"
    listed = penstock("site", "show", "--list", "--json", home=tmp_path)
    assert "mila" in json.loads(listed.stdout)
    check_error(penstock("site", "show", "nowhere", home=tmp_path), 2, "no site profile", "narval")


def test_detection_without_slurm(tmp_path: Path) -> None:
    check_error(penstock("site", "detect", home=tmp_path, PATH="/nonexistent"), 3, "no Slurm here", "--site")


slurm = pytest.mark.skipif(
    "PENSTOCK_TEST_SLURM" not in os.environ,
    reason="PENSTOCK_TEST_SLURM (the env.sh of a test cluster is sourced, and this set to 1) is not set",
)


@slurm
def test_detection_on_a_real_slurm(tmp_path: Path) -> None:
    """Two kinds of nodes, four partitions, one of them preempted; the file it writes is a profile."""
    site = detect()
    assert {"cpu", "gpu", "preempt", "short"} <= set(site.partitions)
    assert site.default_partition() == site.partitions["cpu"]
    assert site.partitions["preempt"].preempted
    assert not site.partitions["gpu"].preempted
    assert site.partitions["short"].seconds == 60
    (kind,) = site.kinds("gpu")
    assert (kind.gpus, kind.gres, kind.count) == (2, "fake", 2)
    done = penstock("site", "detect", "--offline", home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert b"unknown kind: fake" in done.stderr
    assert load_site(str(tmp_path / "config" / "penstock" / "site.toml")).partitions == site.partitions
    check_error(penstock("site", "detect", "--offline", home=tmp_path), 2, "--force")
