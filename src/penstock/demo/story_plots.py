"""Plots of the stories, read from the text file beside this module."""

import pathlib

Plot = tuple[tuple[str, ...], ...]


def load_plots() -> tuple[Plot, ...]:
    """Every plot is a row of beats, every beat the ways of telling it."""
    plots: list[list[list[str]]] = []
    for line in (pathlib.Path(__file__).parent / "plots.txt").read_text(encoding="utf-8").splitlines():
        mark, text = line[0], line[2:]
        if mark == "=":
            plots.append([])
        elif mark == "-":
            plots[-1].append([text])
        elif mark == "|":
            plots[-1][-1].append(text)
    return tuple(tuple(tuple(beat) for beat in plot) for plot in plots)


PLOTS = load_plots()
