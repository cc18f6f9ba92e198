"""CTranslate2: its own converter; greedy search on a static batch."""

from __future__ import annotations

from pathlib import Path

import ctranslate2
from protocol import Loaded, Setup, Stopwatch, Timing, serve


def prepare(setup: Setup) -> None:
    from ctranslate2.converters import TransformersConverter

    converter = TransformersConverter(setup.model, low_cpu_mem_usage=True, load_as_float16=False)
    converter.convert(str(Path(setup.cache) / "model"), quantization=setup.format, force=True)


def load(setup: Setup) -> Loaded:
    folder = Path(setup.cache) / "model"
    generator = ctranslate2.Generator(str(folder), intra_threads=setup.threads, inter_threads=1)
    import json

    words: list[str] = json.loads((folder / "vocabulary.json").read_text())

    def run(prompts: list[list[int]], new: int) -> Timing:
        watch = Stopwatch(len(prompts))

        def told(step: ctranslate2.GenerationStepResult) -> bool:
            watch.step([step.batch_id])
            return False

        generator.generate_batch(
            [[words[token] for token in prompt] for prompt in prompts],
            max_length=new,
            min_length=new,
            beam_size=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=told,
        )
        return watch.timing()

    return Loaded(f"CTranslate2 {ctranslate2.__version__}", run)


if __name__ == "__main__":
    serve(prepare, load)
