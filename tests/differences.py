"""Derivatives of a loss along groups by finite differences: parameters are moved, nothing is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import newton_summary as ns

_OFFSETS = torch.arange(-3.0, 4.0, dtype=torch.float64)
_DERIVATIVES = torch.linalg.inv(_OFFSETS[:, None] ** torch.arange(7)) * torch.tensor(
    [[1.0], [1.0], [2.0], [6.0], [0], [0], [0]]
)
"""Row k: the weights of seven equally spaced values in the k-th derivative of the polynomial through them."""


@dataclass
class Differences:
    """What finite differences say: a number, (S,), (S, S), (S,); and how far they may be off, relatively."""

    loss: float
    gradient: Tensor
    hessian: Tensor
    third: Tensor

    def check(self, summary: ns.Summary, tolerance: float = 1e-5) -> None:
        """Fails where a summary says something else."""
        assert summary.loss.item() == self.loss or abs(summary.loss.item() - self.loss) < 1e-9 * abs(self.loss)
        for name, factor in (("gradient", 0.01), ("hessian", 1.0), ("third", 100.0)):
            ours, theirs = getattr(summary, name), getattr(self, name)
            scale = float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=factor * tolerance * max(scale, 1e-3), msg=name)


def differences(
    loss_fn: Callable[[Any, Any], Tensor],
    model: nn.Module,
    batch: Callable[[], Any],
    direction: Mapping[str, Tensor],
    h: float = 0.004,
) -> Differences:
    """Derivatives of φ(η) = L(θ + Σ η_s u_s), one group for each tensor, from values of the loss alone.

    Args:
        loss_fn: of the model and a batch.
        model: its parameters and buffers are given back what they held.
        batch: makes the batch anew for every evaluation.
        direction: u, by name; complex steps along complex parameters.
        h: the distance between values.
    """
    parameters = dict(model.named_parameters())
    state = {t: t.detach().clone() for t in [*parameters.values(), *model.buffers()]}

    def phi(*moves: tuple[str, float]) -> float:
        with torch.no_grad():
            for tensor, content in state.items():
                tensor.copy_(content)
            for name, eta in moves:
                parameters[name].add_(direction[name], alpha=eta)
        with torch.random.fork_rng(devices=[]):
            return float(loss_fn(model, batch()).detach())

    names, lines = list(direction), {}
    for a in names:
        lines[a] = torch.tensor([phi((a, h * float(k))) for k in _OFFSETS], dtype=torch.float64)
    along = torch.stack([_DERIVATIVES @ lines[a] for a in names])
    hessian = torch.diag(along[:, 2] / h**2)
    for i, a in enumerate(names):
        for j, b in enumerate(names[:i]):
            mixed = [
                weight
                * (
                    phi((a, s * h), (b, s * h))
                    + phi((a, -s * h), (b, -s * h))
                    - phi((a, s * h), (b, -s * h))
                    - phi((a, -s * h), (b, s * h))
                )
                / (4 * (s * h) ** 2)
                for s, weight in ((1, 4 / 3), (2, -1 / 3))
            ]
            hessian[i, j] = hessian[j, i] = sum(mixed)
    loss = phi()
    with torch.no_grad():
        for tensor, content in state.items():
            tensor.copy_(content)
    return Differences(loss, along[:, 1] / h, hessian, along[:, 3] / h**3)


def random_direction(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Random entries of both signs, by parameter name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.complex128 if p.is_complex() else torch.float64).to(
            p.dtype
        )
        for name, p in model.named_parameters()
        if p.requires_grad
    }
