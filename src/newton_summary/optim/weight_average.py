"""The moving average of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from newton_summary.optim.directions import State

_KEY = "average"


class WeightAverage:
    """A moving average of the weights, kept in an optimizer's state, which oscillates less than they do.

    The running statistics of normalisations belong to the weights that they were seen at.  So they are averaged, too,
    and go where the weights go.

    Args:
        parameters: those that are trained.
        model: whose running statistics are averaged.  Default: none are.

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

    def __init__(self, parameters: Sequence[Tensor], model: nn.Module | None = None) -> None:
        self.parameters = parameters
        self.is_in_place = False
        self._model = model
        self._of_statistics: list[Tensor] = []

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
        for average, now in self._paired_statistics():
            average.copy_(torch.where(average.isfinite(), average, now)).lerp_(now, share)  # one bad batch is forgotten

    def restore(self, state: State) -> None:
        """Sends the weights back to their average."""
        torch._foreach_copy_([p.detach() for p in self.parameters], self.values(state))
        for average, now in self._paired_statistics():
            now.copy_(average)

    def exchange(self, state: State) -> None:
        """Puts the average in the place of the weights, or the weights back in theirs."""
        self.is_in_place = not self.is_in_place
        pairs = [*zip(self.values(state), self.parameters, strict=True), *self._paired_statistics()]
        for average, now in pairs:
            before = now.clone()
            now.copy_(average)
            average.copy_(before)

    @torch.inference_mode(False)  # an average made under inference_mode() could not be written later
    def _paired_statistics(self) -> list[tuple[Tensor, Tensor]]:
        """The average of each running statistic, and the statistic; of other normalisations than before, it twice."""
        now = [] if self._model is None else _running_statistics(self._model)
        if [average.shape for average in self._of_statistics] != [statistic.shape for statistic in now]:
            self._of_statistics = [statistic.clone() for statistic in now]
        self._of_statistics = [average.to(s) for average, s in zip(self._of_statistics, now, strict=True)]
        return list(zip(self._of_statistics, now, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer's state does not hold."""
        return {"is_in_place": self.is_in_place, "statistics": [average.clone() for average in self._of_statistics]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.is_in_place = state["is_in_place"]
        self._of_statistics = [average.clone() for average in state.get("statistics", ())]


def _running_statistics(model: nn.Module) -> list[Tensor]:
    """What a model's normalisations are evaluated with: of batches, by moving averages."""
    found = [(m.running_mean, m.running_var) for m in model.modules() if isinstance(m, _NormBase)]
    return [statistic for pair in found for statistic in pair if statistic is not None]
