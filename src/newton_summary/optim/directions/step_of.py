"""The step of another optimizer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from newton_summary.optim.directions.base import Groups, State
from newton_summary.parallel.sharding import local


class StepOf:
    """The step that another optimizer takes, its weight decay and learning rates included: a rate of 1 repeats it.

    Args:
        optimizer: any ``torch.optim.Optimizer`` whose ``step()`` needs no closure.  Do not step it yourself.

    Raises:
        ValueError: it needs one.
    """

    usual_rate = 1.0
    """Its own step, to begin with."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(f"{type(optimizer).__name__} evaluates the loss in its step, so it gives no direction")
        self.optimizer = optimizer
        self.defaults: dict[str, Any] = {}

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """New tensors, u = θ − θ'."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return {}
        before = [p.detach().clone() for p in parameters]
        self.optimizer.step()
        steps = torch._foreach_sub(before, [p.detach() for p in parameters])
        torch._foreach_copy_([local(p.detach()) for p in parameters], [local(b) for b in before])
        return dict(zip(parameters, steps, strict=True))

    def unit(self, parameter: Tensor) -> float:
        """That optimizer's learning rate for this parameter; 1, its own step, where it sets its rates itself."""
        for group in self.optimizer.param_groups:
            if any(p is parameter for p in group["params"]):
                rate = group.get("lr")
                return 1.0 if rate is None else float(rate)
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """That optimizer's."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """That optimizer's."""
        self.optimizer.load_state_dict(state)
