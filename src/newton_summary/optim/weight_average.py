"""Moving averages of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from newton_summary.optim.directions import State

_KEY, _SHOWN = "average", "shown"


class WeightAverage:
    """Moving averages of the weights, kept in an optimizer's state, which oscillate less than they do.

    One takes the weights in now and then, and is what they are compared with.  The other takes those of every step in,
    over a shorter time, and is what the model is evaluated with: where weights sway from one step to the next, those of
    every twentieth sway as much.

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
        self._norms: list[_NormBase] | None = None  # looked for anew now and then: there may be others
        self._of_statistics: dict[str, list[Tensor]] = {}

    def values(self, state: State) -> list[Tensor]:
        """The average of each parameter that the weights are compared with; at first the weights."""
        return self._kept(state, _KEY)

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
        """Takes the weights into the average that they are compared with, as this share of it."""
        self._norms = None
        torch._foreach_lerp_(self.values(state), list(self.parameters), share)
        for average, now in (*self._statistics(_KEY), *self._statistics(_SHOWN)):
            average.copy_(torch.where(average.isfinite(), average, now))  # one bad batch is forgotten
        self._lerp_statistics(_KEY, share)

    def follow(self, state: State, share: float) -> None:
        """Takes the weights of a step into the average that is evaluated, as this share of it."""
        torch._foreach_lerp_(self._kept(state, _SHOWN), list(self.parameters), share)
        self._lerp_statistics(_SHOWN, share)

    def restore(self, state: State) -> None:
        """Sends the weights, and what is evaluated, back to the average that they are compared with."""
        averages = self.values(state)
        torch._foreach_copy_([p.detach() for p in self.parameters], averages)
        torch._foreach_copy_(self._kept(state, _SHOWN), averages)
        for (average, now), (shown, _) in zip(self._statistics(_KEY), self._statistics(_SHOWN), strict=True):
            now.copy_(average)
            shown.copy_(average)

    def exchange(self, state: State) -> None:
        """Puts the average of every step in the place of the weights, or the weights back in theirs."""
        if not self.is_in_place:
            self._norms = None
        self.is_in_place = not self.is_in_place
        for average, now in (*zip(self._kept(state, _SHOWN), self.parameters, strict=True), *self._statistics(_SHOWN)):
            before = now.clone()
            now.copy_(average)
            average.copy_(before)

    def _kept(self, state: State, key: str) -> list[Tensor]:
        """An average of each parameter; at first the weights."""
        memories = [state[p] for p in self.parameters]
        for p, memory in zip(self.parameters, memories, strict=True):
            if key not in memory:
                with torch.inference_mode(False):  # one that was made under inference_mode() could not be written later
                    memory[key] = p.detach().clone(memory_format=torch.preserve_format)
        return [memory[key] for memory in memories]

    def _statistics(self, key: str) -> list[tuple[Tensor, Tensor]]:
        """An average of each running statistic, and the statistic; of other normalisations than before, it twice."""
        if self._norms is None:
            modules = () if self._model is None else self._model.modules()
            self._norms = [m for m in modules if isinstance(m, _NormBase)]
        now = [s for m in self._norms for s in (m.running_mean, m.running_var) if s is not None]
        kept = self._of_statistics.get(key, [])
        if not now and not kept:
            return []
        with torch.inference_mode(False):  # as above
            if [average.shape for average in kept] != [statistic.shape for statistic in now]:
                kept = [statistic.clone() for statistic in now]
            self._of_statistics[key] = [average.to(statistic) for average, statistic in zip(kept, now, strict=True)]
        return list(zip(self._of_statistics[key], now, strict=True))

    def _lerp_statistics(self, key: str, share: float) -> None:
        if pairs := self._statistics(key):
            averages, now = zip(*pairs, strict=True)
            torch._foreach_lerp_(averages, now, share)

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer's state does not hold."""
        statistics = {key: [average.clone() for average in kept] for key, kept in self._of_statistics.items()}
        return {"is_in_place": self.is_in_place, "statistics": statistics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.is_in_place = state["is_in_place"]
        kept = state.get("statistics", {})
        self._of_statistics = {key: [average.clone() for average in averages] for key, averages in kept.items()}
