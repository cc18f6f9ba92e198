"""Sightings: a sentence about animals that somebody saw, and the record that a reader takes from it."""

import dataclasses
import json
import random
import re

from penstock.demo.phrases import article, capitalize, expand
from penstock.demo.sighting_words import ACTIVITIES, ANIMALS, PEOPLE, PLACES, pick, pick_doing
from penstock.demo.templates import SECTIONS

FORMS = SECTIONS["forms"]
FORMS_HELD_OUT = SECTIONS["forms held out"]

_VERBS = (
    "(saw|met|spotted|noticed|watched|found|discovered|observed|encountered|photographed|counted|heard|came across)"
)
_TIMES = (
    "(yesterday|today|this morning|last week|last summer|on sunday|on Monday|at dawn|in the evening|at noon|last night|"
    "in spring|two days ago|a week ago|on Saturday morning|last year|in July|once|early in the morning|after lunch)"
)
# Words around a sighting that say nothing of it.
_HEADS = (
    "(I remember that|as usual,|believe me,|according to my notes,|here is what happened:|suddenly|luckily|"
    "for example,|last time|my friend says that|they say that|nobody knows that|by chance|so,|well,|"
    "this is my report:|finally)"
)
_TAILS = (
    "(and took a picture|and then it rained|, what a day|before it got dark|with my friends|, which was nice|"
    "and the weather was fine|, but nobody believes me|and went home|, and it was fun|at last|again|for hours|"
    "as well as many trees|and a lot of flowers|, said Tom|without making a sound|and also the moon|"
    "for the first time|, just like last year)"
)
_OWNERS = "(my|a|our|the|his|her|their|an early|a short|this|today's|yesterday's|my first|my usual)"
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


@dataclasses.dataclass(frozen=True)
class Sighting:
    """A sentence and what it says."""

    sentence: str
    location: str
    activity: str
    count: int
    animals: tuple[str, ...]

    def record(self) -> str:
        """The one JSON spelling of the answer: this order of keys, no spaces."""
        fields = {
            "location": self.location,
            "activity": self.activity,
            "animals_seen": self.count,
            "animals": list(self.animals),
        }
        return json.dumps(fields, separators=(",", ":"), ensure_ascii=False)


def sighting(rng: random.Random, held_out: bool = False) -> Sighting:
    """A new sentence; held out means forms and words that training never uses."""
    invented = 0.0 if held_out else rng.choice((0.0, 0.0, 0.5, 1.0))
    number = rng.choices((1, 2, 3, 4, 5), (18, 20, 24, 20, 18))[0]
    animals: list[str] = []
    while len(animals) < number:
        animal = pick(ANIMALS, rng, held_out, invented)
        if animal not in animals:
            animals.append(animal)
    location, _, prepositions = pick(PLACES, rng, held_out, invented).partition("/")
    if not held_out and rng.random() < 0.06:
        location, prepositions = location.title(), "name"
    doing = rng.random() < 0.3
    activity = pick_doing(rng, held_out, invented) if doing else pick(ACTIVITIES, rng, held_out, invented)
    form = rng.choice(FORMS_HELD_OUT if held_out else FORMS)
    if doing and any(slot in form for slot in ("{D}", "{G}", "{K}")):
        activity, doing = pick(ACTIVITIES, rng, held_out, invented), False
    if "{R}" in form and not doing:
        activity, doing = pick_doing(rng, held_out, invented), True
    if "{N}" in form and number == 1:
        form = FORMS_HELD_OUT[0] if held_out else FORMS[0]
    plural = "{N}" not in form and number < 4 and rng.random() < 0.04
    amounts = [rng.choice((1, 1, 2)) if plural else 1 for _ in animals]
    if plural:
        animals = [several(name) if amount > 1 else name for name, amount in zip(animals, amounts, strict=True)]
    sentence = form.format(
        S=f"{somebody(rng)} {expand(_VERBS, rng)}",
        L=enumerate_animals(animals, amounts, rng),
        A=activity_phrase(activity, doing, rng),
        P=place_phrase(location, prepositions, rng),
        T=expand(_TIMES, rng),
        N=_NUMBERS[number],
        W=expand("(I|we|my sister|Tom|my friends and I|the class) (went|set out|left|were out|was out|was)", rng),
        G=expand(f"(on|for) {_OWNERS} {activity}", rng),
        K=expand(f"(I|we|Maria|my parents) (took|had|enjoyed|did|made) {_OWNERS} {activity}", rng),
        R=expand(f"(I was|we were|I went|we went|my brother was|Emma went|they were) {activity}", rng),
        D=activity,
    )
    if not held_out and rng.random() < 0.1:
        sentence = f"{expand(_HEADS, rng)} {sentence}"
    if not held_out and rng.random() < 0.15:
        sentence = f"{sentence} {expand(_TAILS, rng)}".replace(" ,", ",")
    sentence = re.sub(r"\ba (?=[aeiou])", "an ", sentence)
    return Sighting(finish(sentence, rng), location, activity, sum(amounts), tuple(animals))


def somebody(rng: random.Random) -> str:
    """Who saw the animals."""
    return rng.choice(PEOPLE.split("|")) if rng.random() < 0.35 else rng.choice(("I", "I", "we"))


def enumerate_animals(animals: list[str], amounts: list[int], rng: random.Random) -> str:
    """`a puppy, a cat and a raccoon`, in one of the ways in which people list things."""
    way = rng.random()
    if way < 0.68:
        names = [article(name) for name in animals]
    elif way < 0.76:
        names = [f"one {name}" for name in animals]
    elif way < 0.84:
        names = [f"the {name}" for name in animals]
    else:
        names = list(animals)
    names = [
        f"{_NUMBERS[amount]} {name}" if amount > 1 else said
        for name, said, amount in zip(animals, names, amounts, strict=True)
    ]
    if len(names) == 1:
        return names[0]
    between, last = rng.choices(
        ((", ", " and "), (", ", ", and "), (" ", " and "), (" and ", " and "), (", ", ", "), (", ", " & ")),
        (55, 15, 14, 8, 5, 3),
    )[0]
    if rng.random() < 0.04:
        return f"first {between.join(names[:-1])}, then {names[-1]}"
    return between.join(names[:-1]) + last + names[-1]


def several(noun: str) -> str:
    """The plural of a regular noun."""
    if noun.endswith(("s", "sh", "ch", "x", "z")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def activity_phrase(activity: str, doing: bool, rng: random.Random) -> str:
    """`during my bike ride`, `while hiking`."""
    if doing:
        return expand(f"(while|when|while I was|as we were|whilst|during) {activity}", rng)
    return expand(f"(during|on|while on|in the middle of|during|at the end of) {_OWNERS} {activity}", rng)


def place_phrase(location: str, prepositions: str, rng: random.Random) -> str:
    """`in the park`, `at the zoo`; a place with a name has no article."""
    if prepositions == "name":
        return f"{rng.choice(('in', 'at', 'near'))} {location}"
    preposition = rng.choice((prepositions or "in").split())
    if rng.random() < 0.08:
        preposition = rng.choice(("through", "around", "inside", "near", "outside", "behind"))
    owner = rng.choices(("the", "a", "our", "this", "my", "his"), (84, 6, 3, 3, 3, 1))[0]
    return f"{preposition} {owner} {location}"


def finish(sentence: str, rng: random.Random) -> str:
    """Casing and the full stop, present or not."""
    sentence = re.sub(r"[.!] [a-z]", lambda match: match.group().upper(), sentence)
    if rng.random() < 0.85:
        sentence = capitalize(sentence)
    return sentence + rng.choices((".", "", "!"), (60, 33, 7))[0]
