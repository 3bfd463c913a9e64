"""The moving average of the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from newton_summary._checks import check_fraction
from newton_summary.optim.directions.base import Groups, State, Stateless, buckets, gradients_of


class Momentum(Stateless):
    """u ← μ u + (1 − μ) g, and u = g at the first step (docs/method.md, section 2).

    Args:
        momentum: μ, in [0, 1).
    """

    mean_key = "momentum"

    def __init__(self, momentum: float = 0.9) -> None:
        check_fraction("momentum", momentum)
        self.defaults = {"momentum": momentum}

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """The averages, which the caller must not write to."""
        for (momentum,), parameters in buckets(groups, "momentum"):
            gradients = gradients_of(parameters)
            for p, g in zip(parameters, gradients, strict=True):
                if "momentum" not in state[p]:
                    state[p]["momentum"] = g.clone(memory_format=torch.preserve_format)
            torch._foreach_lerp_([state[p]["momentum"] for p in parameters], gradients, 1 - momentum)
        return {p: state[p]["momentum"] for group in groups for p in group["params"] if p.grad is not None}
