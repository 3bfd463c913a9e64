"""The true loss along a line: what the models of a summary are models of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from newton_summary.measure import Loss, LossFunction
from newton_summary.measure.direction import resolve_direction
from newton_summary.measure.together import OneOrSeveral
from newton_summary.parallel.sharding import UNSHARDED, check_whole
from newton_summary.partition import Partition, resolve_partition


def losses_along(
    loss_fn: LossFunction,
    model: nn.Module,
    batch: Any,
    factors: Sequence[float],
    *,
    direction: Sequence[Tensor] | Mapping[str, Tensor] | OneOrSeveral,
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
        direction: u, one tensor for each parameter of the partition, in its order or by name; or an optimizer, or
            several, whose next step it is.
        partition: S groups, or the name of a constructor.  Default: one for each tensor.

    Returns:
        Losses, shape (S, n), float64 on the host.

    Raises:
        ValueError: the direction does not fit the partition, or is not finite; a parameter is sharded.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> def loss_fn(model, batch):
        ...     return (model.weight - batch).square().sum()
        >>> u = [(model.weight - 1.0).detach()]
        >>> losses_along(loss_fn, model, torch.ones(1, 2), [0.0, 1.0], direction=u)[0, 1].item()
        0.0
    """
    partition = resolve_partition(partition, model)
    check_whole(partition, "losses_along()", UNSHARDED)
    direction = resolve_direction(direction, partition)
    loss, result = Loss(loss_fn, model), torch.empty(len(partition), len(factors), dtype=torch.float64)
    for group in range(len(partition)):
        for column, eta in enumerate(factors):
            sizes = [eta if number == group else 0.0 for number in range(len(partition))]
            result[group, column] = loss.after_step(batch, partition, direction, sizes)
    return result


class LossAlongStep:
    """The loss after any multiple of one step; the weights stay where the last one has led.

    Args:
        weights: the parameters' memory, which is moved (:meth:`~newton_summary.measure.Loss.movable`).
        step: a tensor for each of them: the weights go to where they began, less size · step.
        loss: computes the loss where the weights are.

    Example:
        >>> weights = torch.tensor([1.0])
        >>> losses = LossAlongStep([weights], [torch.tensor([0.5])], lambda: weights.square().item())
        >>> losses(0.0), losses(2.0), losses(1.0)
        (1.0, 0.0, 0.25)
    """

    def __init__(self, weights: Sequence[Tensor], step: Sequence[Tensor], loss: Callable[[], float]) -> None:
        self.weights, self.step, self.loss = list(weights), list(step), loss
        self._reached = 0.0

    def __call__(self, size: float) -> float:
        """The loss after this multiple of the step."""
        if size != self._reached:
            torch._foreach_sub_(self.weights, self.step, alpha=size - self._reached)
        self._reached = size
        return self.loss()
