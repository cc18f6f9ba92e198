"""Measure the demo model: `python -m penstock.demo.evaluate [MODEL_DIR] [--json]`.

Greedy decoding on questions from templates, and on sightings from forms and words, that training never uses.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import re
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from penstock.demo import model_path
from penstock.demo.facts import load_facts
from penstock.demo.held_out import Asked, Seen, asked_questions, paraphrases, record_prompts, story_openings


class Model:
    """A checkpoint that continues prompts in batches, greedily."""

    def __init__(self, folder: pathlib.Path, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.padding_side = "left"
        self.network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def chat(self, text: str) -> str:
        """The prompt of one user message."""
        messages = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def raw(self, text: str) -> str:
        """The prompt of plain text."""
        return f"{self.tokenizer.bos_token}{text}"

    @torch.inference_mode()
    def complete(self, prompts: list[str], tokens: int, batch: int = 24) -> list[str]:
        """What the model writes after each prompt."""
        # Prompts of like length share a batch, so that little is padded.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        answers = [""] * len(prompts)
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            inputs = self.tokenizer(
                [prompts[i] for i in rows], return_tensors="pt", padding=True, add_special_tokens=False
            )
            made = self.network.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=tokens,
                do_sample=False,
            )
            new = made[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(rows, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                answers[i] = text
        return answers

    @torch.inference_mode()
    def perplexity(self, text: str, window: int = 512) -> float:
        """Perplexity of a text, read in windows that each begin with the first token of a document."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        loss, count = 0.0, 0
        for start in range(0, len(ids), window):
            row = torch.tensor([[self.tokenizer.bos_token_id, *ids[start : start + window]]])
            logits = self.network(input_ids=row).logits[0, :-1].float()
            loss += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
            count += row.shape[1] - 1
        return math.exp(loss / count)


@dataclasses.dataclass
class Score:
    """The figures of a model; shares are between 0 and 1."""

    facts: float
    facts_exact: float
    paraphrases: float
    records: float
    fields: dict[str, float]
    stories: float
    perplexity: float
    wrong: list[str]


def is_right(asked: Asked, answer: str) -> bool:
    """The key is in the answer; where the question already names the key, the whole answer must be right."""
    if asked.key in asked.text:
        return answer.strip() == asked.answer
    return asked.key in answer


def field_hits(seen: Seen, answer: str) -> dict[str, bool]:
    """Which fields of the record are right."""
    try:
        got = json.loads(answer)
    except ValueError:
        got = None
    if not isinstance(got, dict):
        got = {}
    return {name: got.get(name) == value for name, value in json.loads(seen.record).items()}


def story_is_sound(text: str, known: set[str]) -> bool:
    """Sentences end, quotes close, nothing is repeated in a loop, every word is a word."""
    words = re.findall(r"[A-Za-z]+", text)
    if len(words) < 20 or text.count('"') % 2:
        return False
    if not text.rstrip().endswith((".", "!", "?", '"')):
        return False
    runs = [tuple(words[i : i + 6]) for i in range(len(words) - 5)]
    if len(set(runs)) < len(runs):
        return False
    return sum(word.lower() in known for word in words) / len(words) >= 0.98


def evaluate(folder: pathlib.Path, questions: int = 600, records: int = 300, stories: int = 40) -> Score:
    """All figures of one model."""
    model = Model(folder)
    asked = asked_questions(questions)
    by_hand = paraphrases()
    answers = model.complete([model.chat(one.text) for one in asked + by_hand], 64)
    right = [is_right(one, answer) for one, answer in zip(asked + by_hand, answers, strict=True)]
    exact = [answer.strip() == one.answer for one, answer in zip(asked, answers[: len(asked)], strict=True)]
    wrong = [f"{a.text} -> {b}" for a, b, ok in zip(asked + by_hand, answers, right, strict=True) if not ok]

    seen = record_prompts(records)
    made = model.complete([one.text if one.raw else model.chat(one.text) for one in seen], 110)
    hits = [field_hits(one, answer) for one, answer in zip(seen, made, strict=True)]
    wrong += [f"{a.sentence} -> {b}" for a, b, hit in zip(seen, made, hits, strict=True) if not all(hit.values())]

    openings, known = story_openings(stories)
    tales = model.complete([model.raw(text) for text in openings], 240)
    sound = [story_is_sound(a + b, known) for a, b in zip(openings, tales, strict=True)]
    wrong += [f"{a} -> {b}" for a, b, ok in zip(openings, tales, sound, strict=True) if not ok]
    return Score(
        facts=mean(right[: len(asked)]),
        facts_exact=mean(exact),
        paraphrases=mean(right[len(asked) :]),
        records=mean([all(hit.values()) for hit in hits]),
        fields={name: mean([hit[name] for hit in hits]) for name in hits[0]},
        stories=mean(sound),
        perplexity=model.perplexity((model_path() / "heldout.txt").read_text(encoding="utf-8")),
        wrong=wrong,
    )


def mean(values: list[bool]) -> float:
    """Share of true values, to four digits."""
    return round(sum(values) / max(1, len(values)), 4)


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m penstock.demo.evaluate", description=__doc__)
    parser.add_argument("model", nargs="?", type=pathlib.Path, default=model_path())
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--stories", type=int, default=40)
    parser.add_argument("--show-wrong", action="store_true", help="print every wrong answer to stderr")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    score = evaluate(options.model, options.questions, options.records, options.stories)
    if options.show_wrong:
        print("\n".join(score.wrong), file=sys.stderr)
    figures = dataclasses.asdict(score) | {"number_of_facts": len(load_facts())}
    figures.pop("wrong")
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:16} {value}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
