"""The true loss along each group's direction: what the models of a summary are models of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary.measure import Loss, LossFunction
from newton_summary.measure.next_step import next_step
from newton_summary.partition import Partition, resolve_partition


def losses_along(
    loss_fn: LossFunction,
    model: nn.Module,
    batch: Any,
    factors: Sequence[float],
    *,
    direction: Sequence[Tensor] | torch.optim.Optimizer,
    partition: Partition | str | None = None,
) -> Tensor:
    """The loss after each group alone has taken a multiple of its step, L(θ − η u_s): S · n forward passes.

    It is what a summary's models are models of (docs/method.md, section 1).  Nothing of the user's changes; every
    evaluation meets the same random numbers.

    Args:
        loss_fn: ``loss_fn(model, batch)`` gives a scalar.
        model: any module.
        batch: what the loss is computed on.
        factors: η, n numbers.
        direction: u, one tensor for each parameter of the partition; or an optimizer, whose next step it is.
        partition: S groups, or the name of a constructor.  Default: one for each tensor.

    Returns:
        Losses, shape (S, n), float64 on the host.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> def loss_fn(model, batch):
        ...     return (model.weight - batch).square().sum()
        >>> u = [(model.weight - 1.0).detach()]
        >>> losses_along(loss_fn, model, torch.ones(1, 2), [0.0, 1.0], direction=u)[0, 1].item()
        0.0
    """
    partition = resolve_partition(partition, model)
    if isinstance(direction, torch.optim.Optimizer):
        direction = next_step(direction, partition.parameters)
    loss, result = Loss(loss_fn, model), torch.empty(len(partition), len(factors), dtype=torch.float64)
    for group in range(len(partition)):
        for column, eta in enumerate(factors):
            sizes = [eta if number == group else 0.0 for number in range(len(partition))]
            result[group, column] = loss.after_step(batch, partition, direction, sizes)
    return result
