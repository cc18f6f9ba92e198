"""The farm: prompts spread over many workers through a folder on a shared file system, each answered exactly once."""
