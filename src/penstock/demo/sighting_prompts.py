"""Prompts around a sighting: how people ask for the record."""

import json
import random

from penstock.demo.sightings import Sighting

_TYPES = {"location": "string", "activity": "string", "animals_seen": "integer", "animals": "array"}

_SHORT = """
Extract {f} from: {s}
Extract {f} from this sentence: {s}
Extract {f} as JSON: {s}
Return {f} as JSON for: {s}
Give me JSON with the fields {f} for this text: {s}
Please extract {f} from the following sentence: {s}
Fields: {f}. Text: {s}
Fill in {f}: {s}
{s} Extract {f}.
{s} Return JSON with {f}.
{s} Give the answer as JSON with the keys {f}.
From the text "{s}" extract {f}
Which {f} are in: {s}
Make a JSON object with {f} out of: {s}
""".strip().splitlines()

_PLAIN = """
{s}
{s}
{s}
{s}
{s}
{s}
[{s}]
Convert to JSON: {s}
convert to json: {s}
Convert this to JSON: {s}
JSON please: {s}
Extract the animals: {s}
Extract the information: {s}
Extract: {s}
{s} Answer in JSON.
{s} Convert this to JSON.
Turn this into JSON: {s}
Sentence: {s} JSON:
What animals were seen? {s}
Text: {s}
Parse: {s}
""".strip().splitlines()

_LONG = [
    "convert to JSON: '{s}'. please use the following schema: {j}",
    "convert to JSON: '{s}'. please use the following schema: {j}",
    'Convert to JSON: "{s}" Use this schema: {j}',
    "Convert this sentence to JSON: {s} Schema: {j}",
    "Extract the data as JSON with the schema {j} from: {s}",
    "Answer with JSON that fits this schema: {j}\n{s}",
    "Schema: {j}\nSentence: {s}",
    "JSON schema: {j}\nText: {s}",
    "{s} Please use the following schema: {j}",
    "{s}\nUse the following schema: {j}",
    "{s} {j}",
    "Turn the sentence into JSON.\nSentence: {s}\nSchema: {j}",
    "Please extract the information. {s} Return JSON according to {j}",
    "Read this: {s}\nReply in JSON with this schema: {j}",
]


def prompt(sighting: Sighting, rng: random.Random) -> str:
    """One way of asking for the record of this sighting."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(_PLAIN).format(s=sighting.sentence)
    if kind < 0.65:
        return rng.choice(_SHORT).format(s=sighting.sentence, f=field_names(rng))
    # The schema holds braces, so it is put in by replacement and not by format.
    return rng.choice(_LONG).replace("{s}", sighting.sentence).replace("{j}", schema(rng))


def field_names(rng: random.Random) -> str:
    """`location, activity, animals_seen, animals` in several spellings."""
    names = list(_TYPES)
    if rng.random() < 0.1:
        rng.shuffle(names)
    if rng.random() < 0.1:
        names = [f'"{name}"' for name in names]
    if rng.random() < 0.3:
        return ", ".join(names[:-1]) + rng.choice((" and ", ", and ")) + names[-1]
    return rng.choice((", ", ", ", ", ", " ")).join(names)


def schema(rng: random.Random) -> str:
    """A JSON schema as pydantic prints it, or shorter, spaced or compact."""
    titles, bounds = rng.random() < 0.7, rng.random() < 0.5
    properties: dict[str, dict[str, object]] = {}
    for name, kind in _TYPES.items():
        entry: dict[str, object] = {"type": kind}
        if kind == "array":
            entry = {"items": {"type": "string"}, "type": "array"} if titles else {"type": "array"}
            if not titles:
                entry["items"] = {"type": "string"}
        if kind == "integer" and bounds:
            limits: dict[str, object] = {"maximum": rng.choice((5, 5, 10, 100)), "minimum": rng.choice((1, 1, 0))}
            if not titles:
                limits = dict(reversed(limits.items()))
            entry = {**limits, **entry} if titles else {**entry, **limits}
        if titles:
            # Pydantic sorts the keys of an entry: items, maximum, minimum, title, type.
            entry["title"] = name.replace("_", " ").title()
            entry = {key: entry[key] for key in sorted(entry)}
        properties[name] = entry
    required = list(_TYPES)
    title = rng.choice(("Animals", "Animals", "Sighting", "Answer", "Schema", "Record"))
    whole: dict[str, object] = {"properties": properties, "required": required}
    if titles:
        whole |= {"title": title, "type": "object"}
    else:
        whole = {"type": "object", "properties": properties}
        if rng.random() < 0.7:
            whole["required"] = required
    text = json.dumps(whole, separators=(",", ":") if rng.random() < 0.4 else None)
    # A schema printed as a Python dict has single quotes.
    return text.replace('"', "'") if rng.random() < 0.15 else text
