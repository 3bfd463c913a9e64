"""The moving average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from newton_summary.optim.directions import State

_KEY = "average"


class WeightAverage:
    """A moving average of the weights, kept in an optimizer's state, which oscillates less than they do.

    Args:
        parameters: those that are trained.

    Attributes:
        is_in_place: whether the model has the average, and the state the weights.

    Example:
        >>> from collections import defaultdict
        >>> weight, state = torch.nn.Parameter(torch.zeros(1)), defaultdict(dict)
        >>> average = WeightAverage([weight])
        >>> _ = average.values(state)
        >>> with torch.no_grad():
        ...     _ = weight.fill_(1.0)
        ...     average.update(state, share=0.15)
        >>> average.values(state)
        [tensor([0.1500])]
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.is_in_place = False

    def values(self, state: State) -> list[Tensor]:
        """The average of each parameter; at first the weights."""
        for p in self.parameters:
            if _KEY not in state[p]:
                state[p][_KEY] = p.detach().clone(memory_format=torch.preserve_format)
        return [state[p][_KEY] for p in self.parameters]

    def check_kind(self, state: State) -> None:
        """Raises where the model has been converted or moved since: what is remembered of it would not fit.

        Raises:
            RuntimeError: it has.
        """
        first = self.parameters[0]
        now, then = ((t.dtype, t.device) for t in (first, state.get(first, {}).get(_KEY, first)))
        if now != then:
            raise RuntimeError(
                f"the model's parameters are {str(now[0])[6:]} on {now[1]}, and were {str(then[0])[6:]} on {then[1]} "
                "when training began, as what the optimizer remembers is: convert or move the model first, and make "
                "the optimizer then"
            )

    def update(self, state: State, share: float) -> None:
        """Takes the weights in, as this share of the average."""
        torch._foreach_lerp_(self.values(state), list(self.parameters), share)

    def restore(self, state: State) -> None:
        """Sends the weights back to their average."""
        torch._foreach_copy_([p.detach() for p in self.parameters], self.values(state))

    def exchange(self, state: State) -> None:
        """Puts the average in the place of the weights, or the weights back in theirs."""
        self.is_in_place = not self.is_in_place
        for parameter, average in zip(self.parameters, self.values(state), strict=True):
            weights = parameter.clone()
            parameter.copy_(average)
            average.copy_(weights)

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer's state does not hold."""
        return {"is_in_place": self.is_in_place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.is_in_place = state["is_in_place"]
