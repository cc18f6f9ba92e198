"""Models that no family describes, and those too large for their device, computed by transformers.

This folder alone imports transformers and accelerate, and only when such a model is loaded.
"""
