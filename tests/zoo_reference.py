"""Derivatives by the rates of groups from first derivatives alone, for architectures (tests/zoo_models.py).

Only gradients are taken from autograd, at shifted parameters, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import newton_summary as ns

STEP = 0.004
SECOND = (3 / 4, -3 / 20, 1 / 60)  # of f' from f(±h), f(±2h), f(±3h), for the odd parts
THIRD = (-49 / 18, 3 / 2, -3 / 20, 1 / 90)  # of f'' from f(0), and the even parts


def direction_of(partition: ns.Partition, seed: int = 1) -> list[Tensor]:
    """Random entries as large as each tensor's own, in parameter order."""
    generator = torch.Generator().manual_seed(seed)

    def like(p: Tensor) -> Tensor:
        size = float(p.detach().square().mean().sqrt()) or 0.1
        return size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)

    return [like(p) for p in partition.parameters]


def seeded(loss_fn: Callable[[Any, Any], Tensor], model: nn.Module, batch: Any) -> Tensor:
    """The loss with random numbers from one state, which is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return loss_fn(model, batch)


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """By ``backward()``, which is all that a checkpoint of the older kind can."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    loss.backward()
    found = [p.grad for p in parameters]
    for p, gradient in zip(parameters, before, strict=True):
        p.grad = gradient
    return found


def by_differences(
    loss_fn: Callable[[Any, Any], Tensor],
    model: nn.Module,
    batch: Any,
    partition: ns.Partition,
    direction: Sequence[Tensor],
) -> ns.Summary:
    """Loss, gradient, H̄ and the third order's diagonal by central differences of gradients, of sixth order in the step.

    The sum of all of the third order is in ``higher``, as the second difference along all groups at once.
    """
    size = len(partition)
    state = {name: b.clone() for name, b in model.named_buffers()}
    start = [p.detach().clone() for p in partition.parameters]

    def gradient(rates: Tensor) -> tuple[Tensor, Tensor]:
        factors = partition.spread(rates.tolist())
        with torch.no_grad():
            for p, first, u, f in zip(partition.parameters, start, direction, factors, strict=True):
                p.copy_(first + u * f)
            for name, b in model.named_buffers():
                b.copy_(state[name])
        with sdpa_kernel(SDPBackend.MATH):
            loss = seeded(loss_fn, model, batch)
            found = gradients(loss, partition.parameters)
        return loss.detach(), partition.reduce(
            [None if g is None else g * u for g, u in zip(found, direction, strict=True)]
        )

    def around(along: Tensor) -> tuple[Tensor, Tensor]:
        """The first two derivatives of the gradient along some rates."""
        pairs = [[gradient(sign * k * STEP * along)[1] for sign in (1, -1)] for k in (1, 2, 3)]
        slope = sum(c * (a - b) for c, (a, b) in zip(SECOND, pairs, strict=True)) / STEP
        bend = THIRD[0] * here + sum(c * (a + b) for c, (a, b) in zip(THIRD[1:], pairs, strict=True))
        return slope, bend / STEP**2

    loss, here = gradient(torch.zeros(size, dtype=torch.float64))
    rows = [around(row) for row in torch.eye(size, dtype=torch.float64)]
    total = around(torch.ones(size, dtype=torch.float64))[1].sum()
    gradient(torch.zeros(size, dtype=torch.float64))  # puts everything back
    return ns.Summary(
        loss=loss,
        gradient=here,
        hessian=torch.stack([slope for slope, _ in rows]),
        third=torch.stack([bend[s] for s, (_, bend) in enumerate(rows)]),
        names=partition.names,
    ), total


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest entry."""
    scale = float(expected.abs().max())
    return float((got.double() - expected.double()).abs().max()) / (scale or 1.0)
