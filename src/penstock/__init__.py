"""Penstock turns a model name into text on any machine a researcher can get.

From Python: `LLM` is a model; `Result` is what it says; `farm` spreads prompts over many workers and `Farm` is what it
makes; `PenstockError` is what goes wrong.
"""

from importlib import import_module

__version__ = "0.1.0"

# What is imported when it is first used, so that `import penstock` costs nothing. __init__.pyi tells type checkers.
_LAZY = {
    "LLM": "penstock.batch.llm",
    "Farm": "penstock.batch.farm.api",
    "farm": "penstock.batch.farm.api",
    "Result": "penstock.batch.results",
    "PenstockError": "penstock.errors",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
