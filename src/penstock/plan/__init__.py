"""Arithmetic of bytes: what fits where."""
