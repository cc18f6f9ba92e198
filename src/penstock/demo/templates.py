"""Templates of questions and forms of sentences, read from the text files beside this module."""

import pathlib


def load_sections(file: str) -> dict[str, tuple[str, ...]]:
    """The lines of every section of a text file beside this module, by its name."""
    sections: dict[str, list[str]] = {}
    name = ""
    for line in (pathlib.Path(__file__).parent / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("= "):
            name = line[2:]
            sections[name] = []
        elif name:
            sections[name].append(line)
    return {name: tuple(lines) for name, lines in sections.items()}


SECTIONS = load_sections("templates.txt") | load_sections("sighting_forms.txt")

PLACES = {
    "slurm": ("in slurm", "with slurm", "on the cluster", "on slurm", "using slurm", "on our cluster"),
    "penstock": ("with penstock", "in penstock", "using penstock", "of penstock"),
    "models": ("in machine learning", "in language models", "for a language model", "in an llm"),
}
