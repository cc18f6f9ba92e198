"""The optimizer: Muon for the matrices of the layers, AdamW for embedding and norms, on float32 master weights."""

import torch
from torch import Tensor

from penstock.demo.network import Network

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Optimizer:
    """Steps a bfloat16 network by its float32 master weights; its whole state is a flat dict of tensors."""

    def __init__(self, network: Network, matrix_rate: float = 0.02, vector_rate: float = 0.003) -> None:
        self.parameters = dict(network.named_parameters())
        self.master = {name: parameter.detach().float().clone() for name, parameter in self.parameters.items()}
        self.first = {name: torch.zeros_like(value) for name, value in self.master.items()}
        self.second = {
            name: torch.zeros_like(value) for name, value in self.master.items() if not self._is_matrix(name)
        }
        self.matrix_rate, self.vector_rate = matrix_rate, vector_rate
        self.steps = 0

    def _is_matrix(self, name: str) -> bool:
        return self.parameters[name].dim() == 2 and "embed_tokens" not in name

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step at `scale` times the full learning rates; gradients are used up."""
        self.steps += 1
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.float()
            parameter.grad = None
            if self._is_matrix(name):
                self._step_matrix(name, gradient, scale * self.matrix_rate)
            else:
                self._step_vector(name, gradient, scale * self.vector_rate)
            parameter.copy_(self.master[name])

    def _step_matrix(self, name: str, gradient: Tensor, rate: float) -> None:
        momentum = self.first[name].lerp_(gradient, 0.05)
        update = orthogonal(gradient.lerp(momentum, 0.95))
        rows, columns = update.shape
        master = self.master[name]
        master.mul_(1 - rate * 0.05).add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)

    def _step_vector(self, name: str, gradient: Tensor, rate: float) -> None:
        first = self.first[name].lerp_(gradient, 0.1)
        second = self.second[name].lerp_(gradient.square(), 0.02)
        update = (first / (1 - 0.9**self.steps)) / ((second / (1 - 0.98**self.steps)).sqrt() + 1e-10)
        self.master[name].add_(update, alpha=-rate)

    def state(self) -> dict[str, Tensor]:
        """Everything but the step count, as one flat dict."""
        groups = {"master": self.master, "first": self.first, "second": self.second}
        return {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}

    def load(self, state: dict[str, Tensor], steps: int) -> None:
        """Take over a saved state."""
        for key, value in self.state().items():
            value.copy_(state[key])
        self.steps = steps
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.master[name])


def orthogonal(matrix: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all about one, by five Newton-Schulz steps in bfloat16."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.mT if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).float()
