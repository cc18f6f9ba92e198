"""The compiled kernels against their twins, at every level that this machine runs; and life without them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.devices.cpu import flags
from penstock.kernels import native
from tests.checkpoints import save_tiny

LEVELS = [level for level, needed in native._LEVELS.items() if needed <= flags()]
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None,
    reason="no C++ compiler: the kernels are not built here",
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )


@needs_compiler
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_matches_the_twins(level: str) -> None:
    done = python("-m", "tests.kernels.compare", "60", PENSTOCK_CPU_KERNELS=level, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr[-1500:]
    assert f"libpenstock_cpu_{level}.so" in done.stdout


@pytest.mark.skipif(
    shutil.which("aarch64-linux-gnu-g++") is None or shutil.which("qemu-aarch64") is None,
    reason="no cross compiler and emulator of ARM (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
@pytest.mark.parametrize("level", [[], ["-march=armv8.2-a+dotprod"]], ids=["generic", "dotprod"])
def test_the_kernels_of_arm_compute_right(level: list[str], tmp_path: Path) -> None:
    """Products and attention against plain loops, with NEON, in an emulator."""
    root = Path(__file__).parents[2]
    kernels = root / "src/penstock/kernels/cpu"
    numbers = ["-ffp-contract=fast", "-fno-math-errno", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"]
    sources = [root / "tests/kernels/portable.cpp", *kernels.glob("*.cpp")]
    flags = ["-std=c++17", "-O2", "-fopenmp", "-static", *level, *numbers, f"-I{kernels}", "-o", tmp_path / "portable"]
    subprocess.run(
        ["aarch64-linux-gnu-g++", *map(str, flags), *map(str, sources)],
        check=True,
        capture_output=True,
        timeout=170,
    )
    done = subprocess.run(
        ["qemu-aarch64", str(tmp_path / "portable")],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake: the sanitized kernels cannot be built")
@needs_compiler
def test_no_kernel_leaves_its_bounds(tmp_path: Path) -> None:
    """The same comparison with every access checked (AddressSanitizer) and no undefined behaviour (UBSan)."""
    root, target = Path(__file__).parents[2], f"penstock_cpu_{LEVELS[0]}"
    for command in (
        ["cmake", "-S", str(root), "-B", str(tmp_path), "-DPENSTOCK_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"],
        ["cmake", "--build", str(tmp_path), "--target", target],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=240)
    found = subprocess.run(["c++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    done = python(
        *("-m", "tests.kernels.compare", "30"),
        PENSTOCK_CPU_KERNELS=str(tmp_path / f"lib{target}.so"),
        LD_PRELOAD=found.stdout.strip(),
        ASAN_OPTIONS="detect_leaks=0",  # the interpreter's own
        OMP_NUM_THREADS="2",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(tmp_path) in done.stdout


@needs_compiler
def test_the_best_level_is_taken() -> None:
    assert native.LIBRARY is not None
    assert native.LIBRARY._name.endswith(f"_{LEVELS[0]}.so")


def test_without_kernels_the_tokens_are_the_same(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "mistral")
    (tmp_path / "in.jsonl").write_text('{"prompt_token_ids": [5, 6, 7]}\n{"prompt": "the quick brown fox"}\n')
    texts = []
    for level in ("none", ""):
        out = tmp_path / f"out-{level}.jsonl"
        done = python(
            *("-m", "penstock.cli.main", "generate", str(folder), "--input", str(tmp_path / "in.jsonl")),
            *("--output", str(out), "--max-new-tokens", "100", "--ignore-eos", "--dtype", "float32"),
            PENSTOCK_CPU_KERNELS=level,
        )
        assert done.returncode == 0, done.stderr[-1500:]
        texts.append(sorted(out.read_text().splitlines()))
    assert texts[0] == texts[1]
