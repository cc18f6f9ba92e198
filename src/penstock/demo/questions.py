"""Questions: a fact, a template and a style of typing make one question."""

import dataclasses
import random

from penstock.demo import templates
from penstock.demo.facts import Fact
from penstock.demo.phrases import (
    capitalize,
    drop_small_words,
    expand,
    gerund,
    mistype,
    reserved,
    third_person,
)


@dataclasses.dataclass(frozen=True)
class Style:
    """Which templates are open, and how wildly people type."""

    tasks: tuple[str, ...]
    terms: tuple[str, ...]
    frames: tuple[str, ...]
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    held_out: bool


def _style(held_out: bool) -> Style:
    tail = " held out" if held_out else ""
    tasks, terms, frames, openers, closers = (
        templates.SECTIONS[part + tail] for part in ("tasks", "terms", "frames", "openers", "closers")
    )
    return Style(tasks, terms, frames, openers, closers, held_out)


TRAINING, HELD_OUT = _style(False), _style(True)


def wording(patterns: tuple[str, ...], style: Style, rng: random.Random) -> str:
    """A wording of one of the patterns; those reserved for evaluation only there, where there are enough."""
    text = expand(rng.choice(patterns), rng)
    for _ in range(30):
        if reserved(text) == style.held_out:
            return text
        text = expand(rng.choice(patterns), rng)
    return text


def question(fact: Fact, style: Style, rng: random.Random) -> str:
    """One question whose answer is the fact."""
    kinds = [("task", 5.0 if fact.tasks else 0.0), ("term", 2.5 if fact.terms else 0.0)]
    kinds += [("code", 2.5 if fact.codes else 0.0), ("question", 2.5 if fact.questions else 0.0)]
    kind = rng.choices([name for name, _ in kinds], [weight for _, weight in kinds])[0]
    if kind == "task":
        return ask_task(place(wording(fact.tasks, style, rng), fact.domain, rng), style, rng)
    if kind == "term":
        return ask_term(place(wording(fact.terms, style, rng), fact.domain, rng), style, rng)
    if kind == "code":
        return ask_term(quote(rng.choice(fact.codes), rng), style, rng)
    return polish(rng.choice(style.frames).format(q=wording(fact.questions, style, rng)), style, rng)


def ask_task(task: str, style: Style, rng: random.Random) -> str:
    """A question after a way to do something."""
    template = rng.choice(style.tasks)
    return polish(template.format(t=task, g=gerund(task), s=third_person(task)), style, rng)


def ask_term(term: str, style: Style, rng: random.Random) -> str:
    """A question after the meaning of something."""
    return polish(rng.choice(style.terms).format(x=term), style, rng)


def place(text: str, domain: str, rng: random.Random) -> str:
    """Now and then people add where they are: `in slurm`."""
    return f"{text} {rng.choice(templates.PLACES[domain])}" if rng.random() < 0.2 else text


def quote(code: str, rng: random.Random) -> str:
    """A piece of code as people write it: bare, in backticks or in quotes, with a word before or after it."""
    mark = rng.choices(("", "`", "'", '"'), (5, 3, 1, 1))[0]
    if code.startswith("the "):
        return code
    text = f"{mark}{code}{mark}"
    if rng.random() < 0.15:
        word = "flag" if code.startswith("--") else "command"
        text = rng.choice((f"the {word} {text}", f"the {text} {word}", f"{text} in a script"))
    return text


def polish(text: str, style: Style, rng: random.Random) -> str:
    """Greeting, politeness, slips, casing and punctuation around a question."""
    if rng.random() < 0.08:
        text = drop_small_words(text, rng)
    asks = text.split(" ")[0].lower() in {"how", "what", "which", "why", "who", "when", "where", "can", "could"}
    asks = asks or text.split(" ")[0].lower() in {"is", "do", "does", "may", "would", "any"}
    if rng.random() < 0.12:
        text += rng.choice(style.closers)
    opener = rng.choice(style.openers) + " " if rng.random() < 0.15 else ""
    if rng.random() < 0.1:
        text = mistype(text, rng)
    case = rng.random()
    if case < 0.3:
        text = (opener + text).lower() if "`" not in text and "-" not in text and "_" not in text else opener + text
    elif case < 0.31:
        text = (opener + text).upper() if "`" not in text and "-" not in text and "_" not in text else opener + text
    elif opener and opener[-2] == ".":
        text = opener + capitalize(text)
    else:
        text = capitalize(opener + text)
    ends = ("?", "", ".", "??", "!", " ?") if asks else (".", "", "?", "!", "...", " .")
    return text + rng.choices(ends, (60, 25, 8, 2, 2, 3))[0]
