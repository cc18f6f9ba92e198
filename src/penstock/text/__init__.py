"""Text: tokenizer, chat template, incremental detokenizer, stop strings.

Imports nothing above it, and no torch.
"""
