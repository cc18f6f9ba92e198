"""The reference of the Python API says what the docstrings say."""

from __future__ import annotations

import runpy

from tests.process import ROOT


def test_the_page_is_as_the_docstrings_are() -> None:
    made = runpy.run_path(str(ROOT / "docs/reference/make.py"))
    text = (ROOT / "docs/reference/python-api.md").read_text()
    assert made["page"]() == text, "run python docs/reference/make.py"
    assert "_Not" not in text
    assert "None\n\n##" not in text  # a docstring that is not there
