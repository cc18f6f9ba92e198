"""Rows in, rows out: local generation over a file of prompts."""
