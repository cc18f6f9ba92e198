"""GGUF files (version 3, and 2, which is laid out alike): read with suspicion, given out as a model folder."""
