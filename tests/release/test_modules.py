"""The modulefiles with both programs that read such files, in a tree that has been moved."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from penstock.cluster import release

INITS = {
    "lmod": Path("/usr/share/lmod/lmod/init/bash"),
    "environment-modules": Path("/usr/share/modules/init/bash"),
}


@pytest.mark.parametrize("program", INITS)
def test_load_and_unload(program: str, tmp_path: Path) -> None:
    if not INITS[program].is_file():
        pytest.skip(f"{program} is not installed (Debian has both; they exclude each other)")
    templates = Path(str(release.__file__)).parent
    first = tmp_path / "first" / "modulefiles" / "penstock"
    first.mkdir(parents=True)
    shutil.copy(templates / "module.lua", first / "0.1.0.lua")
    shutil.copy(templates / "module.tcl", first / "0.1.0")
    (tmp_path / "first" / "bin").mkdir()
    (tmp_path / "first" / "bin" / "penstock").write_text("#!/bin/sh\necho it runs\n")
    (tmp_path / "first" / "bin" / "penstock").chmod(0o755)
    prefix = tmp_path / "moved"
    (tmp_path / "first").rename(prefix)
    script = f"""
        . {INITS[program]}
        module use {prefix}/modulefiles
        module avail penstock 2>&1 | grep -c penstock/0.1.0
        module load penstock
        penstock
        echo "$PENSTOCK_PREFIX"
        module unload penstock
        echo "after: $PENSTOCK_PREFIX"
        command -v penstock || echo gone
    """
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "--norc", "-c", script], env=env, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert lines[0] != "0", done.stderr
    assert lines[1:] == ["it runs", str(prefix), "after: ", "gone"], done.stdout + done.stderr
