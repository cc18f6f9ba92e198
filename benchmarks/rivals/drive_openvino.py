"""OpenVINO GenAI: converted and quantized by optimum-intel (NNCF), run by its continuous batching pipeline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from protocol import Loaded, Setup, Stopwatch, Timing, serve

WEIGHTS = {"int4": "int4", "int8": "int8", "bf16": "fp16"}  # it computes in bfloat16 where the processor has it


def prepare(setup: Setup) -> None:
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", setup.model]
    command += ["--task", "text-generation-with-past", "--weight-format", WEIGHTS[setup.format], setup.cache]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def load(setup: Setup) -> Loaded:
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 8192  # every prompt of a job in one step
    scheduler.max_num_seqs = 64
    scheduler.dynamic_split_fuse = False
    scheduler.enable_prefix_caching = False
    scheduler.cache_size = 1  # GB
    properties = {"INFERENCE_NUM_THREADS": setup.threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(setup.cache, scheduler, "CPU", properties)
    numbers = iter(range(2**62))

    def run(prompts: list[list[int]], new: int) -> Timing:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        tensors = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        watch = Stopwatch(len(prompts))
        handles = [pipeline.add_request(next(numbers), tensor, config) for tensor in tensors]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            watch.step([i for i, handle in enumerate(handles) if handle.can_read() and handle.read()])
        return watch.timing()

    return Loaded(f"OpenVINO GenAI {openvino_genai.__version__}", run)


if __name__ == "__main__":
    serve(prepare, load)
