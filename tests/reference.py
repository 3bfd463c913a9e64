"""Slow twins, written another way: dense derivatives of φ, a bisection for the cubic model, loops over groups."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

import newton_summary as ns


def dense_derivatives(loss_fn, model: nn.Module, batch, partition: ns.Partition, direction: list[Tensor], order: int):
    """[φ(0), φ'(0), …] by forward-mode differentiation of φ(η) = L(θ + U I η) as a function of η."""
    names, tensors = partition.parameter_names, [p.detach() for p in partition.parameters]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, batch):
            return loss_fn(self.inner, batch)

    def phi(eta: Tensor) -> Tensor:
        moved = {
            f"inner.{name}": p + u * eta[label]
            for name, p, u, label in zip(names, tensors, direction, partition.labels, strict=True)
        }
        return torch.func.functional_call(
            Wrapped(), {**{f"inner.{k}": b for k, b in buffers.items()}, **moved}, (batch,)
        )

    eta = torch.zeros(len(partition), dtype=tensors[0].dtype)
    result, function = [phi(eta)], phi
    for _ in range(order):
        function = torch.func.jacrev(function)
        result.append(function(eta))
    return [value.detach() for value in result]


def cubic_by_bisection(gradient, hessian, third, regularization: float) -> np.ndarray:
    """The minimiser of the cubic model where every D_s is positive, by bisection on r = ‖D η‖."""
    g, h = (np.asarray(x, dtype=float) for x in (gradient, hessian))
    d2 = np.abs(np.asarray(third, dtype=float)) ** (2 / 3)
    lowest = np.linalg.eigvalsh(h / np.sqrt(np.outer(d2, d2)))[0]
    low = max(0.0, -2 * lowest / regularization) * (1 + 1e-15)

    def eta(r: float) -> np.ndarray:
        return np.linalg.solve(h + regularization / 2 * r * np.diag(d2), g)

    def excess(r: float) -> float:
        try:
            return np.sqrt(np.sum(d2 * eta(r) ** 2)) - r
        except np.linalg.LinAlgError:  # at the lowest r that there may be, where η is infinite
            return np.inf

    high = max(low, 1e-12)
    while excess(high) > 0:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return eta((low + high) / 2)


class PaperReference:
    """Algorithm 1 of the paper, for one tensor in each group."""

    def __init__(
        self, model, loss_fn, measuring_batches, *, lr, regularization, every, momentum, rate_momentum
    ) -> None:
        self.model, self.loss_fn, self.batches = model, loss_fn, measuring_batches
        self.lr, self.regularization, self.every = lr, regularization, every
        self.momentum, self.rate_momentum = momentum, rate_momentum
        self.partition = ns.Partition.canonical(model)
        self.u: list[Tensor] | None = None
        self.eta: np.ndarray | None = None
        self.t = 0

    def step(self) -> None:
        gradients = [p.grad.clone() for p in self.partition.parameters]
        past = gradients if self.u is None else self.u
        self.u = [self.momentum * a + (1 - self.momentum) * g for a, g in zip(past, gradients, strict=True)]
        if self.t % self.every == 0:
            batch = self.batches[self.t // self.every]
            _, g, h, third = dense_derivatives(self.loss_fn, self.model, batch, self.partition, self.u, 3)
            diagonal = torch.einsum("sss->s", third)
            new = cubic_by_bisection(g, h, diagonal, self.regularization)
            self.eta = new if self.eta is None else self.rate_momentum * self.eta + (1 - self.rate_momentum) * new
        with torch.no_grad():
            for p, u, eta in zip(self.partition.parameters, self.u, self.eta, strict=True):
                p -= self.lr * max(float(eta), 0.0) * u
        self.t += 1
