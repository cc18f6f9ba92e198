#!/bin/sh
# sh install.sh PREFIX: install this release of Penstock. No network, no root. PYTHON names the interpreter to use.
# The installed tree may be moved or copied afterwards; only the interpreter must stay where it is.
set -eu
release=$(cd -- "$(dirname -- "$0")" && pwd)
if [ $# -ne 1 ]; then echo "usage: sh install.sh PREFIX" >&2; exit 2; fi
wanted=$(sed -n 's/^python=//p' "$release/target")
python=${PYTHON:-$(command -v "python$wanted" || command -v python3 || true)}
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)
if [ "$found" != "$wanted" ]; then
    echo "This release is for Python $wanted; ${python:-python3} is ${found:-missing}." >&2
    echo "Load a module that has it (module avail python), or say where it is: PYTHON=/path/python$wanted sh install.sh PREFIX" >&2
    exit 3
fi
if [ -e "$1" ] && [ -n "$(ls -A "$1" 2>/dev/null)" ]; then
    echo "$1 is not empty. Give a new folder: one release, one prefix." >&2
    exit 2
fi
(cd "$release" && sha256sum --quiet --check SHA256SUMS) || { echo "The release is damaged: copy it again." >&2; exit 3; }
mkdir -p "$1"
prefix=$(cd -- "$1" && pwd)
# what is half done must not look like an installation
trap 'rm -rf "$prefix"; echo "Not installed." >&2' EXIT
"$python" -m venv --without-pip "$prefix"
pip=$(echo "$release"/wheels/pip-*.whl)
"$prefix/bin/python" "$pip/pip" --isolated --disable-pip-version-check install --quiet --no-index --no-deps --no-compile \
    --no-cache-dir --require-hashes --find-links "$release/wheels" --requirement "$release/requirements.txt"
"$prefix/bin/python" -I "$release/finish.py" "$prefix" "$release"
trap - EXIT
echo "Installed in $prefix."
echo "Use it:  $prefix/bin/penstock doctor"
echo "or:      module use $prefix/modulefiles && module load penstock"
