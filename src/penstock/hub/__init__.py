"""From a model name to one verified snapshot on disk."""
