"""Penstock: the engine in this process, as `penstock generate` runs it. Its formats are those of --quantize, or
bf16."""

from __future__ import annotations

import sys

from protocol import Loaded, Setup, Stopwatch, Timing, serve


def prepare(setup: Setup) -> None:
    """Nothing to convert: the engine packs the checkpoint as it loads."""


def load(setup: Setup) -> Loaded:
    from penstock.devices.threads import bind_threads

    bind_threads(setup.threads)  # before torch is imported
    from penstock import __version__
    from penstock.engine.config import EngineConfig
    from penstock.engine.loop import EngineLoop
    from penstock.engine.request import EngineRequest
    from penstock.formats import FORMATS

    dtype, _, weights = setup.format.rpartition("+")  # bf16, fp32, int8, int4, fp32+int8 ...
    named = {"bf16": "bfloat16", "fp32": "float32"}
    config = EngineConfig(
        setup.model,
        dtype=named.get(dtype) or named.get(weights) or "auto",
        quantize=weights if weights in FORMATS else "none",
        max_batch_total_tokens=16384,
        prefix_caching=False,
        threads=setup.threads,
    )
    engine = EngineLoop.load(config, lambda stage: print(f"{stage.name}: {stage.text}", file=sys.stderr))

    def run(prompts: list[list[int]], new: int) -> Timing:
        watch = Stopwatch(len(prompts))
        for i, prompt in enumerate(prompts):
            engine.add(EngineRequest(i, prompt, new, ignore_eos=True))
        while engine.has_work:
            for output in engine.step().outputs:
                if output.error is not None:
                    raise RuntimeError(output.error)
                for _ in output.tokens:
                    watch.step([output.id])
        return watch.timing()

    return Loaded(f"Penstock {__version__}", run, engine.cost.step([(1, 0)], scored=1).weight_bytes)


if __name__ == "__main__":
    serve(prepare, load)
