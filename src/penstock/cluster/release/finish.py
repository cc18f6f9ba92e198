"""The last step of install.sh: make the tree movable, compile it, add the modulefiles. Runs with nothing installed.

usage: finish.py PREFIX RELEASE
"""

import compileall
import os
import py_compile
import shutil
import sys
from pathlib import Path

# A shell line that is also a Python string: it starts the interpreter that lies beside the script, wherever that is.
START = """#!/bin/sh
'''exec' "$(dirname -- "$(readlink -f -- "$0")")/python" "$0" "$@"
' '''
"""


def main(prefix: Path, release: Path) -> None:
    movable_scripts(prefix / "bin")
    modules = prefix / "modulefiles" / "penstock"
    modules.mkdir(parents=True)
    version = (release / "version").read_text().strip()
    shutil.copyfile(release / "module.lua", modules / f"{version}.lua")
    shutil.copyfile(release / "module.tcl", modules / version)
    shutil.copytree(release / "licenses", prefix / "licenses")
    # by hash and unchecked: times of files change when a tree is copied, and shared file systems are slow to ask
    compileall.compile_dir(
        prefix / "lib",
        quiet=2,
        workers=len(os.sched_getaffinity(0)),
        maxlevels=50,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def movable_scripts(folder: Path) -> None:
    """Scripts that name the interpreter by its full path find the one beside them instead."""
    for script in folder.iterdir():
        if script.is_symlink() or not script.is_file():
            continue
        first, _, rest = script.read_bytes().partition(b"\n")
        if first.startswith(b"#!") and str(folder).encode() in first + rest.split(b"\n", 1)[0]:
            if first == b"#!/bin/sh":  # a path too long for the kernel: pip writes two lines of the same kind
                rest = rest.split(b"\n", 2)[2]
            script.write_bytes(START.encode() + rest)
    for script in folder.glob("[Aa]ctivate*"):
        script.unlink()  # they have the full path inside; the modulefiles do their work


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
