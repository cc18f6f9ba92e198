"""Penstock turns a model name into text on any machine a researcher can get."""

__version__ = "0.1.0"
