"""Anthropic's messages route."""
