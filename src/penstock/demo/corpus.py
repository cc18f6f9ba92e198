"""The corpus: an endless, repeatable stream of documents made by the generators."""

import itertools
import json
import random
from collections.abc import Iterator

from penstock.demo.facts import Fact, load_facts
from penstock.demo.questions import HELD_OUT, TRAINING, Style, question
from penstock.demo.sighting_prompts import prompt
from penstock.demo.sighting_words import ANIMALS, invented_word, pick
from penstock.demo.sightings import sighting
from penstock.demo.smalltalk import talk, unknown
from penstock.demo.stories import story, story_request

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
USER, ASSISTANT, SYSTEM = "<|user|>", "<|assistant|>", "<|system|>"

# A document is pieces of text, each with the weight of its tokens in the loss. What the model should say counts
# fully, what people say to it a little: reading is worth learning, but it is not the aim.
Document = list[tuple[str, float]]
ASKED, SAID, TOLD = 0.1, 1.0, 0.6

FIRST_DOCUMENTS = 30_000

_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are the Penstock demo model.",
    "You answer questions about Slurm and Penstock.",
    "Answer briefly.",
    "Be kind and short.",
    "You are a friendly assistant for people on a cluster.",
    "You are a bot.",
)


class Corpus:
    """Documents by kind; the same seed gives the same documents."""

    def __init__(self, seed: int, held_out: bool = False, first: int = FIRST_DOCUMENTS) -> None:
        self.rng = random.Random(f"corpus {seed} {held_out}")
        self.held_out = held_out
        self.first = first
        self.style: Style = HELD_OUT if held_out else TRAINING
        self.facts: list[Fact] = load_facts()

    def documents(self) -> Iterator[Document]:
        """Documents without end, in the mixture that the model is trained on."""
        kinds = (self.exchange, self.record, self.told, self.page, self.echo)
        for made in itertools.count():
            # Copying is learned first and quickest from plain echoes; later a few keep it alive.
            kind = self.rng.choices(kinds, (50, 43, 8, 1.5, 30 if made < self.first else 3))[0]
            yield kind()

    def turn(self) -> tuple[str, str]:
        """A question and its answer."""
        kind = self.rng.random()
        if kind < 0.05:
            return talk(self.style, self.rng)
        if kind < 0.13:
            return unknown(self.style, self.rng)
        fact = self.rng.choice(self.facts)
        return question(fact, self.style, self.rng), fact.answer

    def exchange(self) -> Document:
        """A conversation of one turn, seldom more; or a bare question with the answer on the next line."""
        form = self.rng.random()
        if form < 0.12:
            asked, said = self.turn()
            if self.rng.random() < 0.6:
                return [(BEGIN + asked, ASKED), ("\n" + said + END, SAID)]
            if self.rng.random() < 0.5:
                return [(BEGIN + asked + self.rng.choice(("\n", "\n\n")), ASKED), (said + END, SAID)]
            return [(f"{BEGIN}Question: {asked}\nAnswer:", ASKED), (" " + said + END, SAID)]
        turns = [self.turn() for _ in range(self.rng.choices((1, 2, 3), (88, 9, 3))[0])]
        return self.chat(turns)

    def chat(self, turns: list[tuple[str, str]]) -> Document:
        """Turns in the chat template, sometimes with a system message."""
        head = BEGIN
        if self.rng.random() < 0.12:
            head += SYSTEM + self.rng.choice(_SYSTEMS)
        document: Document = []
        for asked, said in turns:
            document += [(f"{head}{USER}{asked}{ASSISTANT}", ASKED), (said + END, SAID)]
            head = ""
        return document

    def record(self) -> Document:
        """A sighting and its record, in the chat template or as raw text."""
        seen = sighting(self.rng, self.held_out)
        asked, said = prompt(seen, self.rng), seen.record()
        if self.rng.random() < 0.35:
            # Without weight: where plain text ends without a full stop, the record comes next, and not the stop.
            return [(BEGIN + asked + self.rng.choice(("", "", "", "\n", " ")), 0.0), (said + END, SAID)]
        if asked != seen.sentence and asked.startswith(seen.sentence) and self.rng.random() < 0.2:
            # The wish may stand in the system message, and the sentence alone in the user's.
            wish = asked.removeprefix(seen.sentence).strip()
            return [(f"{BEGIN}{SYSTEM}{wish}{USER}{seen.sentence}{ASSISTANT}", ASKED), (said + END, SAID)]
        return self.chat([(asked, said)])

    def told(self) -> Document:
        """A story, mostly as plain text, sometimes asked for."""
        if self.rng.random() < 0.12:
            asked, said = story_request(self.style, self.rng)
            return [(f"{BEGIN}{USER}{asked}{ASSISTANT}", ASKED), (said + END, TOLD)]
        return [(BEGIN + story(self.rng) + END, TOLD)]

    def echo(self) -> Document:
        """Words, and the same words again: as they are, or as a JSON list."""
        words = [invented_word(self.rng) for _ in range(self.rng.randint(2, 14))]
        words += [pick(ANIMALS, self.rng, self.held_out, 0.0) for _ in range(self.rng.randint(0, 4))]
        self.rng.shuffle(words)
        line = self.rng.choice((" ", " ", ", ")).join(words)
        form = self.rng.random()
        if form < 0.3:
            return [(f"{BEGIN}{line}\n", ASKED), (f"{line}\n{line}{END}", SAID)]
        if form < 0.5:
            return [(f"{BEGIN}{USER}Repeat: {line}{ASSISTANT}", ASKED), (line + END, SAID)]
        listed = json.dumps(words, separators=(",", ":"))
        if form < 0.8:
            return [(f"{BEGIN}{USER}JSON list: {line}{ASSISTANT}", ASKED), (listed + END, SAID)]
        return [(f"{BEGIN}{line}\n", ASKED), (listed + END, SAID)]

    def page(self) -> Document:
        """Several short raw texts on one page, as in a file."""
        return [(BEGIN + "\n\n".join(self.paragraph() for _ in range(4)) + END, 0.3)]

    def paragraph(self) -> str:
        """One raw text of any kind."""
        kind = self.rng.random()
        if kind < 0.35:
            return story(self.rng).replace("\n\n", " ")
        if kind < 0.7:
            return "\n".join(self.turn())
        seen = sighting(self.rng, self.held_out)
        return f"{seen.sentence}\n{seen.record()}"

    def held_out_text(self, characters: int) -> str:
        """A file of such paragraphs, for perplexity."""
        parts: list[str] = []
        while sum(map(len, parts)) < characters:
            parts.append(self.paragraph())
        return "\n\n".join(parts) + "\n"
