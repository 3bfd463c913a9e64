"""How the rates of groups compare, apart from how long a step is."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from newton_summary.optim.rates import AveragedRates


class RelativeRates:
    """Rates whose size is that of the first ones, and whose ratios are those of the last measurement.

    One scale adapts the length of a step in multiples of these rates: were their size to change with each
    measurement, what it has found would be lost.  So new rates are brought to the length at which they have the same
    curvature, ηᵀ H̄ η, in the measured averages as those before.

    Args:
        value: the first ones, shape (S,); ``None`` where the first measurement gives them.

    Attributes:
        value: shape (S,), float64; ``None`` before the first measurement.

    Example:
        >>> relative = RelativeRates()
        >>> for rates in (torch.tensor([1.0, 1.0]), torch.tensor([6.0, 0.0])):
        ...     relative.update(rates, hessian=torch.eye(2))
        >>> relative.value
        tensor([1.4142, 0.0000])
    """

    def __init__(self, value: Tensor | None = None) -> None:
        self.value = value

    def update(self, rates: Tensor, hessian: Tensor) -> None:
        """Takes the ratios of rates just measured; where all are 0, or a curvature is not positive, it does not.

        Args:
            rates: η, shape (S,).
            hessian: H̄ of the averages that they were solved from, shape (S, S).
        """
        if not bool(torch.any(rates > 0)):
            return
        if self.value is None:
            self.value = rates
            return
        before, now = (float(eta @ hessian @ eta) for eta in (self.value, rates))
        if before > 0 and now > 0:
            self.value = rates * math.sqrt(before / now)

    def follow(self, rule: AveragedRates) -> None:
        """Takes the ratios of the rates that a rule has solved for, if it has."""
        rates, mean = rule.rates, rule.average.value
        if rates is not None and mean is not None and mean.hessian is not None:
            self.update(rates, mean.hessian)

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, which torch does not cast to a parameter's type."""
        return {"value": None if self.value is None else self.value.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        value = state["value"]
        self.value = None if value is None else torch.tensor(value, dtype=torch.float64)
