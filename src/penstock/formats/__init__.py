"""One file a weight format: how its bytes load and how it multiplies."""
