"""Batches: documents packed into windows that always begin with the beginning of a document."""

import itertools
from collections.abc import Iterator

import torch
from tokenizers import Tokenizer
from torch import Tensor

from penstock.demo.corpus import Corpus, Document


def encode(tokenizer: Tokenizer, documents: list[Document]) -> list[tuple[list[int], list[float]]]:
    """Token ids and loss weights of every document.

    Pieces are encoded one by one, because a prompt and its answer are never joined before they are tokens.
    """
    pieces = [text for document in documents for text, _ in document]
    encodings = iter(tokenizer.encode_batch(pieces, add_special_tokens=False))
    encoded = []
    for document in documents:
        ids: list[int] = []
        weights: list[float] = []
        for _, weight in document:
            new = next(encodings).ids
            ids += new
            weights += [weight] * len(new)
        encoded.append((ids, weights))
    return encoded


def windows(corpus: Corpus, tokenizer: Tokenizer, length: int) -> Iterator[tuple[list[int], list[float]]]:
    """Windows of `length` + 1 tokens; what does not fit at the end of a window is cut off there."""
    documents = corpus.documents()
    ids: list[int] = []
    weights: list[float] = []
    while True:
        for new_ids, new_weights in encode(tokenizer, list(itertools.islice(documents, 256))):
            ids += new_ids
            weights += new_weights
            if len(ids) > length:
                yield ids[: length + 1], weights[: length + 1]
                ids, weights = [], []


def batches(corpus: Corpus, tokenizer: Tokenizer, rows: int, length: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, targets and weights of the targets, each [rows, length]."""
    source = windows(corpus, tokenizer, length)
    while True:
        taken = list(itertools.islice(source, rows))
        ids = torch.tensor([row for row, _ in taken])
        weights = torch.tensor([row for _, row in taken])
        yield ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:].contiguous()
