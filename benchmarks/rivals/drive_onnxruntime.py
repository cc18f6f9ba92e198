"""onnxruntime-genai: its own model builder makes the ONNX model."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnxruntime_genai as og
from protocol import Loaded, Setup, Stopwatch, Timing, serve


def prepare(setup: Setup) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", setup.model, "-o", setup.cache]
    command += ["-p", setup.format, "-e", "cpu", "-c", f"{setup.cache}/builder"]
    if setup.format == "int4":
        command += ["--extra_options", "int4_accuracy_level=4"]  # 8-bit activations, its fastest
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def load(setup: Setup) -> Loaded:
    config = og.Config(setup.cache)
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {setup.threads}}}}}}}}}')
    model = og.Model(config)

    def run(prompts: list[list[int]], new: int) -> Timing:
        streams, length = len(prompts), len(prompts[0])
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, batch_size=streams, max_length=length + new, min_length=length + new)
        generator = og.Generator(model, params)
        watch = Stopwatch(streams)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(new):
            generator.generate_next_token()
            watch.step(range(streams))
        return watch.timing()

    return Loaded(f"onnxruntime-genai {og.__version__}", run)


if __name__ == "__main__":
    serve(prepare, load)
