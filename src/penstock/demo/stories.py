"""Stories: simple, grammatical, and with people who keep their names and pronouns to the end."""

import random
import re

from penstock.demo import story_words as words
from penstock.demo.phrases import article, capitalize, expand
from penstock.demo.questions import Style, polish
from penstock.demo.story_plots import PLOTS

OPENINGS = (
    "once upon a time there was {a_hero} (called|named) {n}.",
    "once upon a time, {village}, there lived {a_hero} (called|named) {n}.",
    "once upon a time there lived {a_hero} {village}. {his} name was {n}.",
    "once upon a time, {a_hero} (called|named) {n} lived {village}.",
    "once there was {a_hero} (called|named) {n}, who lived {village}.",
    "once {n} and {fn} lived {village}.",
    "there was once {a_hero} whose name was {n}.",
    "there was {a_hero} called {n}. {n} lived {village}.",
    "there lived {a_hero} {village}. {his} name was {n}.",
    "a long time ago, {a_hero} lived {village}. {his} name was {n}.",
    "long ago, {village}, there lived {a_hero} called {n}.",
    "{village} there lived {a_hero} called {n}.",
    "{village} lived {n}, {a_hero}.",
    "{n} was {a_hero}. {he} lived {village}.",
    "{n} was {a_hero} who loved to (sing|read|swim|climb trees|play|draw|dance|tell stories|sleep late).",
    "{n} and {fn} were best friends.",
    "{n} and {fn} lived {village}.",
    "{n} lived {village} with {his} (mother|father|grandmother|two brothers|family|friend {fn}).",
    "it was (a sunny|a rainy|a cold|a warm|a windy|a beautiful) (day|morning|evening), "
    "and {n} was (bored|happy|alone|at home|outside).",
    "this is the story of {n}, {a_hero}.",
    "my (grandmother|father|teacher) told me this story about {n}, {a_hero}.",
    "do you know {n}? {n} is {a_hero} who lives {village}.",
    "the sun was shining when {n} woke up.",
    "{weather}. {n} looked out of the window and smiled.",
    "{weather}, and {n} was on the way to {place}.",
    "{time} {n} met {fn} near {place}.",
    "last (summer|winter|week|night|spring) {n} was (at {place}|with {fn}|at home).",
    "in (the morning|the summer|the winter|the evening) {n} liked to go to {place}.",
    "every (day|morning|Sunday|evening) {n} went to {place} with {fn}.",
    "far away, {village}, {n} lived with {his} friend {fn}.",
    "the (old|little|wise) {beast} told this story about {n}.",
)
BRIDGES = (
    "{n} loved {place} more than anything.",
    "{he} was always (friendly|kind|busy|in a good mood|hungry|a little late).",
    "{he} liked {food} very much.",
    "everybody liked {him}, for {he} was kind.",
    "{he} had (a red cap|warm gloves|a loud voice|big blue eyes|a nice smile|two left shoes).",
)
FRIEND_BRIDGES = (
    "{his} best friend was {fn}.",
    "{his} friend {fn} lived nearby.",
    "{n} had a friend whose name was {fn}.",
    "{he} often went to {place} to play with {fn}.",
)
ENDINGS = (
    "from that day on {n} was never alone again.",
    "{n} was {feeling} and went home.",
    "and so {n} learned that {lesson}.",
    "that night {n} slept well and dreamed of {place}.",
    "and they lived happily ever after.",
    "{n} and {fn} stayed friends for ever.",
    "it was the best day of the whole year.",
    "in the evening {n} told {his} mother everything, and she was {feeling}.",
    "{n} smiled, for {he} knew now that {lesson}.",
    '"That was a good day," said {n}.',
    '"Let us do it again tomorrow," said {fn}.',
    "they ate {food} together and were {feeling}.",
)
_SENTENCE_START = re.compile(r'(^|[.!?] |\." )([a-z])')


def story(rng: random.Random) -> str:
    """One story of some eight to fourteen sentences."""
    return tell(cast(rng), rng)


def tell(values: dict[str, str], rng: random.Random) -> str:
    """A story with this cast."""
    parts = [rng.choice(OPENINGS)]
    parts += rng.sample(BRIDGES, rng.choice((0, 0, 1, 1, 2)))
    if "{fn}" not in parts[0] and rng.random() < 0.6:
        parts.append(rng.choice(FRIEND_BRIDGES))
    parts += [rng.choice(beat) for beat in rng.choice(PLOTS)]
    met = any("{fn}" in part for part in parts)
    parts += rng.sample([end for end in ENDINGS if met or "{fn}" not in end], rng.choice((1, 1, 2)))
    times = rng.sample(words.TIMES.split("|"), 4)
    sentences = []
    for part in parts:
        sentences.append(sentence(part, values, rng, times[-1]))
        if "{time}" in part:
            times.pop()
    if rng.random() < 0.12:
        half = len(sentences) // 2
        return " ".join(sentences[:half]) + "\n\n" + " ".join(sentences[half:])
    return " ".join(sentences)


def cast(rng: random.Random) -> dict[str, str]:
    """Who and what this story is about."""
    hero, he, him, his, a_hero = _person(rng)
    friend, fhe, fhim, fhis, _ = _person(rng)
    while friend == hero:
        friend, fhe, fhim, fhis, _ = _person(rng)
    return {
        "n": hero, "he": he, "him": him, "his": his, "a_hero": a_hero,
        "fn": friend, "fhe": fhe, "fhim": fhim, "fhis": fhis,
        "toy": rng.choice(words.TOYS.split("|")),
        "color": rng.choice(words.COLORS.split("|")),
        "food": rng.choice(words.FOODS.split("|")),
        "beast": rng.choice(words.BEASTS.split("|")),
        "noise": rng.choice(words.NOISES.split("|")),
        "village": rng.choice(words.VILLAGES.split("|")),
    }  # fmt: skip


def sentence(pattern: str, values: dict[str, str], rng: random.Random, time: str) -> str:
    """One sentence, or a few, told with the cast; places and times may change from sentence to sentence."""
    passing = {
        "place": rng.choice(words.PLACES.split("|")),
        "weather": rng.choice(words.WEATHERS.split("|")),
        "time": time,
        "feeling": rng.choice(words.FEELINGS.split("|")),
        "lesson": rng.choice(words.LESSONS.split("|")),
    }
    text = expand(pattern, rng).format(**values, **passing)
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return _SENTENCE_START.sub(lambda match: match.group(1) + match.group(2).upper(), capitalize(text))


def _person(rng: random.Random) -> tuple[str, str, str, str, str]:
    """Name, pronouns and description."""
    girl = rng.random() < 0.5
    name = rng.choice((words.GIRLS if girl else words.BOYS).split("|"))
    he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
    trait = rng.choice(words.TRAITS.split("|"))
    kind = rng.random()
    if kind < 0.5:
        noun = "girl" if girl else "boy"
    elif kind < 0.85:
        noun = rng.choice(words.BEASTS.split("|"))
    else:
        people = [
            one for one in words.PEOPLE.split("|") if one not in (("king", "prince") if girl else ("queen", "princess"))
        ]
        noun = rng.choice(people)
    return name, he, him, his, article(f"{trait} {noun}")


_REQUESTS = (
    "tell me a story",
    "tell me a (short|nice|little|good) story",
    "write [me] a (short|nice|little) story",
    "I want to hear a story",
    "can you tell [me] a story",
    "a story, please",
    "(make up|invent|tell) a story",
    "(tell|write) me a bedtime story",
)


def story_request(style: Style, rng: random.Random) -> tuple[str, str]:
    """A wish for a story, perhaps about somebody, and the story."""
    values = cast(rng)
    asked = expand(rng.choice(_REQUESTS), rng)
    kind = rng.random()
    if kind < 0.3:
        asked += f" about {values['n']}"
    elif kind < 0.6:
        asked += f" about {values['a_hero']}"
    elif kind < 0.7:
        asked += f" about {values['n']} and {values['fn']}"
    return polish(asked, style, rng), tell(values, rng)
