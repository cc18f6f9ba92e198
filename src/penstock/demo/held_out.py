"""What training never sees: questions, sightings and story openings for measuring the model."""

import dataclasses
import pathlib
import random
import re

from penstock.demo import story_plots, story_words
from penstock.demo.corpus import BEGIN, Corpus
from penstock.demo.facts import load_facts
from penstock.demo.questions import HELD_OUT, question
from penstock.demo.sighting_prompts import prompt
from penstock.demo.sightings import sighting
from penstock.demo.stories import story


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question, the string that a right answer holds, and the full answer."""

    text: str
    key: str
    answer: str


@dataclasses.dataclass(frozen=True)
class Seen:
    """A prompt for a record, the sentence in it, and the right record."""

    text: str
    sentence: str
    record: str
    raw: bool


def asked_questions(count: int, seed: int = 11) -> list[Asked]:
    """Questions from the held-out templates, every fact in turn."""
    rng = random.Random(f"asked {seed}")
    facts = load_facts()
    rng.shuffle(facts)
    chosen = [facts[i % len(facts)] for i in range(count)]
    return [Asked(question(fact, HELD_OUT, rng), fact.key, fact.answer) for fact in chosen]


def paraphrases() -> list[Asked]:
    """Questions that a person wrote, free of any template."""
    answers = {fact.key: fact.answer for fact in load_facts()}
    lines = (pathlib.Path(__file__).parent / "paraphrases.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("\t") for line in lines if not line.startswith("#")]
    return [Asked(text, key, answers[key]) for key, text in pairs]


def record_prompts(count: int, seed: int = 12) -> list[Seen]:
    """Sightings in held-out forms with held-out words; a third of the prompts are raw text."""
    rng = random.Random(f"seen {seed}")
    prompts = []
    for i in range(count):
        seen = sighting(rng, held_out=True)
        raw = i % 3 == 2
        text = prompt(seen, rng)
        prompts.append(Seen(BEGIN + text if raw else text, seen.sentence, seen.record(), raw))
    return prompts


_OPENINGS = (
    "Once upon a time",
    "Once upon a time there was a",
    "Once upon a time, in a small village,",
    "One day",
    "One sunny morning, Lily",
    "There was a little girl",
    "A long time ago",
    "Long ago there lived",
    "In a quiet town",
    "Tom had a red ball.",
    "It was raining and Anna was bored.",
    "The little mouse was hungry.",
    "Max and Emma were best friends.",
    "The sun was shining when",
    "Every morning the farmer",
    "My grandmother told me",
    "This is the story of",
    "Last winter",
    "Deep in the forest",
    "A small dragon lived",
)


def story_openings(count: int, seed: int = 13) -> tuple[list[str], set[str]]:
    """Openings to go on from, and all words that a story may hold."""
    rng = random.Random(f"stories {seed}")
    openings = list(_OPENINGS)
    while len(openings) < count:
        words = story(rng).split(" ")
        openings.append(" ".join(words[: rng.randint(6, 22)]))
    known = {word for _ in range(3000) for word in re.findall(r"[a-z]+", story(rng).lower())}
    known |= set(re.findall(r"[a-z]+", f"{vars(story_words)} {story_plots.PLOTS} {_OPENINGS}".lower()))
    return openings[:count], known


def held_out_text(characters: int = 45_000) -> str:
    """The text of model/heldout.txt."""
    return Corpus(99, held_out=True).held_out_text(characters)
