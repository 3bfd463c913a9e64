"""Backtracking: a step that was solved for is halved until the loss agrees with the model that it was solved from."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from newton_summary.summary import Summary

_MOST_HALVINGS = 40


def halvings_to_agreement(
    summary: Summary, eta: Tensor, loss_after: Callable[[Tensor], float], precision: float
) -> int | None:
    """How often a step must be halved until the loss follows its quadratic model along it.

    Both are of the same samples, so that their noise cancels.  Rounding of the loss is no disagreement.

    Args:
        summary: the measurement, with H̄.
        eta: the step's rates, λ_1 included, shape (S,).
        loss_after: the loss, on the samples that were measured, after a step of such rates.
        precision: the relative rounding of a loss.

    Returns:
        The number; ``None`` where no length of step makes them agree: the loss is noise at this scale (half precision,
        or a randomness of its own), which says nothing of the rates.

    Example:
        >>> import torch
        >>> summary = Summary(loss=1.0, gradient=[1.0], hessian=[[1.0]])  # where it is 1 − η + 4 η²
        >>> eta = torch.ones(1, dtype=torch.float64)
        >>> halvings_to_agreement(summary, eta, lambda eta: 1 - float(eta) + 4 * float(eta) ** 2, precision=0.0)
        3
    """
    assert summary.hessian is not None
    rounding = 8 * precision * abs(summary.loss.item())
    for halvings in range(_MOST_HALVINGS):
        linear = -float(summary.gradient @ eta)
        quadratic = 0.5 * float(eta @ summary.hessian @ eta)
        actual = loss_after(eta) - summary.loss.item()
        if abs(actual - (linear + quadratic)) <= 0.5 * (abs(linear) + abs(quadratic)) + rounding:
            return halvings
        eta = eta / 2
    return None
