"""What is kept of a prompt's hidden states while it is computed, in chunks and perhaps twice after a preemption."""

from __future__ import annotations

import torch
from torch import Tensor

from penstock.engine.request import Embed


class PromptStates:
    """The states that one request asks for. layers: as Embed numbers them; count: positions that were taken."""

    def __init__(self, embed: Embed, num_layers: int) -> None:
        self.layers, self.pooling, self.count = embed.of(num_layers), embed.pooling, 0
        self._kept: Tensor | None = None

    def add(self, states: Tensor) -> None:
        """The states of the next positions, [layers, n, hidden]."""
        kept = self._kept
        if self.pooling == "mean":  # summed in float64, so that the chunks do not matter
            total = states.sum(dim=1, keepdim=True, dtype=torch.float64)
            self._kept = total if kept is None else kept + total
        elif self.pooling == "last":
            self._kept = states[:, -1:].float()
        elif self.pooling == "first":
            self._kept = states[:, :1].float() if kept is None else kept
        else:
            self._kept = states.float() if kept is None else torch.cat((kept, states.float()), dim=1)
        self.count += states.shape[1]

    def take(self) -> bytes | None:
        """What was kept, as SequenceOutput.embedding has it, and forget it; None where there is nothing."""
        kept, self._kept = self._kept, None
        if kept is None:
            return None
        if self.pooling == "mean":
            kept = (kept / self.count).float()
        return kept.contiguous().cpu().numpy().tobytes()
