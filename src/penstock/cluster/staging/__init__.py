"""Bringing a model to every node of a job: one leader a node, the fastest way measured on the model's own bytes."""
