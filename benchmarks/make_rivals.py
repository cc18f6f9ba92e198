"""Make the virtual environments of the engines that `penstock bench compare` measures Penstock against.

    python benchmarks/make_rivals.py                          (all of them; about 6 GB)
    python benchmarks/make_rivals.py llama.cpp transformers   (only these)
    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu python benchmarks/make_rivals.py   (the small PyTorch)

Each rival gets an environment of its own in --folder, with pinned versions from PyPI; llama.cpp is compiled for this
processor (a C++ compiler and some ten minutes of one core). At the end `rivals.json` in that folder tells
`penstock bench compare` where they are. Nothing is installed into the environment that runs this script.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

DRIVERS = Path(__file__).resolve().parent / "rivals"

# What a rival needs, and in which formats it is worth measuring. The PyTorch of all is the one Penstock is tested with.
TORCH = "torch==2.13.0"
OPENMP = {"llama.cpp", "transformers", "penstock"}  # their threads are bound to cores, which they do not do themselves
RIVALS: dict[str, tuple[list[str], list[str]]] = {
    # name: (packages, formats)
    "llama.cpp": (
        ["llama-cpp-python==0.3.36", "gguf==0.19.0", "safetensors", TORCH],
        ["q4_0", "q4_k_m", "q8_0", "bf16"],
    ),
    "openvino": (["openvino-genai==2026.4.1.0", "optimum-intel==2.2.0", "nncf==3.4.0", TORCH], ["int4", "int8"]),
    "onnxruntime": (["onnxruntime-genai==0.18.0", "onnx-ir==1.1.0", "transformers==5.23.0", TORCH], ["int4"]),
    "ctranslate2": (["ctranslate2==4.8.5", "transformers==5.23.0", TORCH], ["int8"]),
    "transformers": (["transformers==5.23.0", "accelerate", TORCH], ["bf16"]),
}


def default_folder() -> Path:
    """Where `penstock bench compare` looks when nothing else is said."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PENSTOCK_RIVALS") or Path(cache) / "penstock" / "rivals")


def make(name: str, folder: Path) -> dict[str, object]:
    """Install one rival; what is there already stays. Returns its entry for rivals.json."""
    packages, formats = RIVALS[name]
    python = folder / name / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / name)], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
    if (
        name == "openvino"
    ):  # optimum-intel asks for it; it is of no use here, and PyPI's does not fit a PyTorch without CUDA
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)
    return entry(name, python, formats)


def entry(name: str, python: Path, formats: list[str]) -> dict[str, object]:
    """What rivals.json says of an engine."""
    driver = DRIVERS / f"drive_{name.replace('.', '_')}.py"
    return {"python": str(python), "driver": str(driver), "formats": formats, "openmp": name in OPENMP}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="RIVAL", help=f"which ones (default: {' '.join(RIVALS)})")
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where they go (default: %(default)s)")
    args = parser.parse_args()
    if unknown := sorted(set(args.names) - set(RIVALS)):
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(RIVALS)}")
    args.folder.mkdir(parents=True, exist_ok=True)
    manifest = args.folder / "rivals.json"
    known = {"penstock": entry("penstock", Path(sys.executable), ["bf16", "int8", "int4"])}
    known |= json.loads(manifest.read_text()) if manifest.exists() else {}
    failed = []
    for name in args.names or RIVALS:
        print(f"{name}: installing", file=sys.stderr, flush=True)
        try:
            known[name] = make(name, args.folder)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: failed ({error}); the others go on", file=sys.stderr)
        manifest.write_text(json.dumps(known, indent=1) + "\n")
    print(manifest)
    if failed:
        raise SystemExit(f"not made: {', '.join(failed)}")


if __name__ == "__main__":
    main()
