"""`penstock plan` beside measurements: decode tokens/s of twelve shapes on this machine, predicted and measured.

    python benchmarks/plan.py [--quantize int8] [--only NAME]

The weights are random (`--dummy-weights`), and `plan` takes the limits that the same run of the benchmark measured.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BASE = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def llama(hidden: int, wide: int, layers: int, heads: int, kv_heads: int, vocab: int, **more: Any) -> dict[str, Any]:
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes = {"hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers, "vocab_size": vocab}
    return {**BASE, **sizes, **heads_of, **more}


SHAPES = {
    "4M": llama(256, 688, 4, 4, 4, 2048),
    "30M": llama(512, 1376, 8, 8, 8, 8192),
    "deep and narrow": llama(512, 1376, 32, 8, 2, 8192),
    "SmolLM2-135M": llama(576, 1536, 30, 9, 3, 49152),
    "SmolLM2-360M": llama(960, 2560, 32, 15, 5, 49152),
    "Qwen3 mid": {**BASE, "model_type": "qwen3"},
    "Qwen2 mid": {**BASE, "model_type": "qwen2", "num_hidden_layers": 16},
    "Qwen2.5-0.5B": llama(896, 4864, 24, 14, 2, 151936, model_type="qwen2"),
    "Qwen3-0.6B": llama(1024, 3072, 28, 16, 8, 151936, model_type="qwen3", head_dim=128),
    "shallow and wide": llama(2560, 6912, 6, 40, 8, 32000),
    "TinyLlama-1.1B": llama(2048, 5632, 22, 32, 4, 32000, tie_word_embeddings=False),
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256),
}


def penstock(*args: str) -> Any:
    done = subprocess.run([sys.executable, "-m", "penstock.cli.main", *args], capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return json.loads(done.stdout)


def compare(folder: Path, name: str, quantize: str) -> list[float]:
    """Measure one shape, predict it, print both. Returns the errors as shares."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPES[name]))
    load = ("-b", "1", "-b", "8", "-s", "128", "-d", "32", "-r", "5", "-w", "2")
    report = penstock("bench", "static", str(folder), "--dummy-weights", "--quantize", quantize, *load, "--json")
    file = folder / "bench.json"
    file.write_text(json.dumps(report))
    rows = penstock("plan", str(folder), "--cpu", "--measured", str(file), "--json")["measured"]
    for row in rows:
        print(
            f"{name:>18}  {row['what']:<28} {row['measured']:>9,.1f} measured {row['predicted']:>9,.1f} predicted",
            end="",
        )
        print(f"  {row['error']:+6.1%}", flush=True)
    return [row["error"] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--only", choices=list(SHAPES))
    options = parser.parse_args()
    errors = []
    with tempfile.TemporaryDirectory() as folder:
        for name in [options.only] if options.only else SHAPES:
            errors += compare(Path(folder) / name.replace(" ", "-"), name, options.quantize)
    print(
        f"largest error {max(map(abs, errors)):.1%}, {sum(abs(e) <= 0.25 for e in errors)} of {len(errors)} within 25 %"
    )


if __name__ == "__main__":
    main()
