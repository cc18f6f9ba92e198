"""Phrases: one line of a pattern stands for many wordings; noise makes them look typed by people."""

import random
import re
import zlib

_INNERMOST = re.compile(r"\(([^()\[\]]*)\)|\[([^()\[\]]*)\]")


def expand(pattern: str, rng: random.Random) -> str:
    """One wording of a pattern: `(a|b)` is a choice, `[a]` may be left out."""

    def pick(match: re.Match[str]) -> str:
        if match.group(1) is not None:
            return str(rng.choice(match.group(1).split("|")))
        return str(rng.choice(match.group(2).split("|"))) if rng.random() < 0.4 else ""

    while _INNERMOST.search(pattern):
        pattern = _INNERMOST.sub(pick, pattern)
    return " ".join(pattern.split())


def reserved(text: str, one_in: int = 8) -> bool:
    """Whether this wording is kept away from training; depends on nothing but the text."""
    return zlib.crc32(text.lower().encode()) % one_in == 0


_DOUBLED = "get set run put let stop cap submit shut cut log pin skip quit begin plan drop chat chop tap bet"


def gerund(phrase: str) -> str:
    """`list my jobs` becomes `listing my jobs`."""
    verb, _, rest = phrase.partition(" ")
    if verb == "not":
        return f"not {gerund(rest)}"
    if verb.endswith("ie"):
        verb = verb[:-2] + "y"
    elif verb.endswith("e") and not verb.endswith(("ee", "ye")):
        verb = verb[:-1]
    elif verb in _DOUBLED.split():
        verb += verb[-1]
    return f"{verb}ing {rest}".strip()


def third_person(phrase: str) -> str:
    """`list my jobs` becomes `lists my jobs`."""
    verb, _, rest = phrase.partition(" ")
    if verb == "not":
        return f"does not {rest}"
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        verb += "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        verb = verb[:-1] + "ies"
    else:
        verb += "s"
    return f"{verb} {rest}".strip()


def article(noun: str) -> str:
    """The noun with `a` or `an`."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def mistype(text: str, rng: random.Random) -> str:
    """The text with one slip of the finger in a plain word of five letters or more."""
    words = text.split(" ")
    plain = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha()]
    if not plain:
        return text
    i = rng.choice(plain)
    word, at = words[i], rng.randrange(1, len(words[i]) - 1)
    slips = (
        word[:at] + word[at + 1 :],
        word[:at] + word[at] + word[at:],
        word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    )
    words[i] = rng.choice(slips)
    return " ".join(words)


def drop_small_words(text: str, rng: random.Random) -> str:
    """The text as a hurried person types it: some of the smallest words are missing."""
    small = {"a", "an", "the", "my", "do", "of", "is", "please"}
    kept = [word for word in text.split(" ") if word.lower() not in small or rng.random() < 0.5]
    return " ".join(kept) or text


def capitalize(text: str) -> str:
    """First letter large, the rest as it is."""
    return text[:1].upper() + text[1:]
