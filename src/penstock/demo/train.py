"""Train the demo model: `python -m penstock.demo.train --out DIR --minutes 70`.

Everything is made here: the text, the tokenizer, the weights. The learning rate follows the clock, so that the
training ends in time on any machine; a slower one only sees less text.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from penstock.demo.batches import batches
from penstock.demo.corpus import FIRST_DOCUMENTS, Corpus
from penstock.demo.network import Network, Shape
from penstock.demo.optimizer import Optimizer
from penstock.demo.vocabulary import learn_tokenizer, save_tokenizer

ROWS, LENGTH, FAR, VOCABULARY = 10, 384, 1024, 2560
BEGIN_ID = 0
PLAIN = 0.23
CHECKPOINT_SECONDS = 240.0


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, train, write the model folder."""
    parser = argparse.ArgumentParser(prog="python -m penstock.demo.train", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the model")
    parser.add_argument("--minutes", type=float, default=70.0, help="time of training")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=ROWS, help="windows per step")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in the folder")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    train(options.out, options.minutes * 60, options.seed, options.rows, options.resume)
    return 0


def train(out: pathlib.Path, seconds: float, seed: int, rows: int = ROWS, resume: bool = False) -> None:
    """Train for this long, from the start or from the checkpoint, and write the finished model."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    progress = Progress()
    if resume and (out / "checkpoint" / "progress.json").exists():
        progress = Progress(**json.loads((out / "checkpoint" / "progress.json").read_text(encoding="utf-8")))
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    else:
        tokenizer = learn_tokenizer(seed, VOCABULARY)
    shape = Shape(vocabulary=tokenizer.get_vocab_size())
    save_tokenizer(tokenizer, out, shape.positions)
    network = Network(shape).bfloat16()
    optimizer = Optimizer(network)
    if progress.steps:
        optimizer.load(load_file(out / "checkpoint" / "state.safetensors"), progress.steps)
    say(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, {shape.vocabulary} tokens")
    # A resumed run reads fresh documents: the seed moves with the step.
    near, wide = (
        Corpus(seed + progress.steps + more, first=0 if progress.steps else FIRST_DOCUMENTS) for more in (0, 500_000)
    )
    short = batches(near, tokenizer, rows, LENGTH)
    long = batches(wide, tokenizer, max(1, rows * LENGTH // FAR), FAR)
    before, start, saved = progress.seconds, time.monotonic(), time.monotonic()
    while progress.seconds < seconds:
        # Every tenth batch has few long windows without walls between documents, so that the model gets to know
        # late positions and does not mind what stands in front of a question.
        far = progress.steps % 10 == 9
        inputs, targets, weights = next(long if far else short)
        # A target of weight 0.1 counts fully in one step of ten: the same on average, with a tenth of the work.
        wanted = torch.rand(weights.shape) < weights
        logits = network(inputs, None if far else BEGIN_ID, wanted)
        loss = F.cross_entropy(logits, targets[wanted])
        torch.autograd.backward(loss)
        optimizer.step(rate(progress.seconds / seconds))
        progress.steps += 1
        progress.tokens += inputs.numel()
        progress.seconds = before + time.monotonic() - start
        progress.loss = 0.98 * progress.loss + 0.02 * loss.item() if progress.steps > 1 else loss.item()
        if progress.steps % 50 == 0:
            say(progress.line())
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save_checkpoint(out, optimizer, progress)
            save_model(out, network, shape)
            saved = time.monotonic()
    save_checkpoint(out, optimizer, progress)
    save_model(out, network, shape)
    say("done: " + progress.line())


@dataclasses.dataclass
class Progress:
    """How far a training is."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0

    def line(self) -> str:
        """One line for the log."""
        speed = self.tokens / max(self.seconds, 1e-9)
        return (
            f"step {self.steps}, {self.seconds / 60:.1f} min, {self.tokens / 1e6:.2f} M tokens, "
            f"{speed:.0f} tokens/s, loss {self.loss:.3f}"
        )


def rate(done: float) -> float:
    """Share of the full learning rate.

    A short rise and a plain at the full rate, on which copying is found; then a lower one, for the noise of small
    batches is too much for learning facts at the full rate, that falls in a straight line to nothing.
    """
    if done < PLAIN:
        return min(1.0, done / 0.01 + 0.05)
    return 0.4 * max(0.0, (1.0 - done) / (1.0 - PLAIN))


def save_checkpoint(out: pathlib.Path, optimizer: Optimizer, progress: Progress) -> None:
    """Write what `--resume` needs; the progress file comes last and by rename, so that the pair is whole."""
    folder = out / "checkpoint"
    folder.mkdir(exist_ok=True)
    save_file(optimizer.state(), folder / "state.part")
    (folder / "progress.part").write_text(json.dumps(dataclasses.asdict(progress)), encoding="utf-8")
    (folder / "state.part").replace(folder / "state.safetensors")
    (folder / "progress.part").replace(folder / "progress.json")


def save_model(out: pathlib.Path, network: Network, shape: Shape) -> None:
    """Write weights and configuration the way that transformers reads them."""
    weights = {name: value.detach().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, out / "model.part", metadata={"format": "pt"})
    # Safetensors makes files that only the owner can read; a model is for everybody.
    (out / "model.part").chmod(0o644)
    (out / "model.part").replace(out / "model.safetensors")
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "max_new_tokens": 256}
    (out / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n", encoding="utf-8")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


def say(text: str) -> None:
    """Progress goes to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
