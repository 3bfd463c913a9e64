"""The step of another optimizer, or of several."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.next_step import needs_closure
from newton_summary.measure.together import OneOrSeveral, members_of, together
from newton_summary.optim.directions.base import Groups, State
from newton_summary.parallel.sharding import copy_parts


class StepOf:
    """The step that another optimizer takes, its weight decay and learning rates included: a rate of 1 repeats it.

    Args:
        optimizer: any ``torch.optim.Optimizer`` whose ``step()`` needs no closure, or several over different
            parameters, such as Muon for matrices and AdamW for the rest.  Do not step them yourself.

    Attributes:
        optimizers: they, in their order.

    Raises:
        TypeError: something in the list is no optimizer.
        ValueError: one needs a closure, the list is empty, or two hold the same parameter.
    """

    usual_rate = 1.0
    """Its own step, to begin with."""

    def __init__(self, optimizer: OneOrSeveral) -> None:
        self.optimizers = members_of(together(optimizer))
        for member in self.optimizers:
            if needs_closure(member):
                raise ValueError(f"{type(member).__name__} evaluates the loss in its step, so it gives no direction")
        self.defaults: dict[str, Any] = {}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all of them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """New tensors, u = θ − θ'."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not parameters:
            return {}
        before = [p.detach().clone() for p in parameters]
        for optimizer in self.optimizers:
            optimizer.step()
        steps = torch._foreach_sub(before, [p.detach() for p in parameters])
        copy_parts([p.detach() for p in parameters], before)
        return dict(zip(parameters, steps, strict=True))

    def unit(self, parameter: Tensor) -> float:
        """That optimizer's learning rate for this parameter; 1, its own step, where it sets its rates itself."""
        for group in self.param_groups:
            if any(p is parameter for p in group["params"]):
                rate = group.get("lr")
                return 1.0 if rate is None else float(rate)
        return 1.0

    def mean_of(self, parameter: Tensor, state: State) -> Tensor | None:
        """What that optimizer remembers of the mean of a parameter's gradients, under torch's names for it."""
        memories = [m for optimizer in self.optimizers if (m := optimizer.state.get(parameter))]
        means = [m.get(key) for m in memories for key in ("exp_avg", "momentum_buffer")]
        return next((mean for mean in means if isinstance(mean, Tensor)), None)

    def state_dict(self) -> dict[str, Any]:
        """That optimizer's, or theirs by number."""
        if len(self.optimizers) == 1:
            return self.optimizers[0].state_dict()
        return {str(number): optimizer.state_dict() for number, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        if len(self.optimizers) == 1:
            self.optimizers[0].load_state_dict(state)
            return
        for number, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(number)])
