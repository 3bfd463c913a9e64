"""The gradient itself."""

from __future__ import annotations

from torch import Tensor

from newton_summary.optim.directions.base import Groups, State, Stateless


class Gradient(Stateless):
    """u = g, the gradient of the last batch."""

    def __init__(self) -> None:
        self.defaults = {}

    def update(self, groups: Groups, state: State) -> dict[Tensor, Tensor]:
        """The gradients as they are."""
        return {p: p.grad for group in groups for p in group["params"] if p.grad is not None}
