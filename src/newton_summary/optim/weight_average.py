"""Moving averages of the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from newton_summary.measure.half import SINGLE, wide
from newton_summary.optim.directions import State
from newton_summary.parallel.sharding import copy_parts

_KEY, _BEFORE, _DISPLACED = "average", "average_before", "displaced"


class WeightAverage:
    """A moving average of the weights, kept in an optimizer's state, which oscillates less than they do.

    It takes the weights of every step in: where they sway from one step to the next, those of every twentieth sway as
    much.  That of weights in half precision is in single precision, for a step adds less than they have digits for.  A
    copy of it, as it was when all was well, is what to go back to where the weights have diverged since.

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
        ...     average.follow(state, share=0.15)
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
        """The average of each parameter, in single precision at least; at first the weights."""
        return self._kept(state, _KEY)

    def before(self, state: State) -> list[Tensor]:
        """The average as it was when it was last kept, in the weights' precision; at first the weights."""
        return self._kept(state, _BEFORE)

    def check_kind(self, state: State) -> None:
        """Raises where the model has been converted or moved since: what is remembered of it would not fit.

        Raises:
            RuntimeError: it has.
        """
        first = self.parameters[0]
        now, then = ((t.dtype, t.device) for t in (first, state.get(first, {}).get(_BEFORE, first)))
        if now != then:
            raise RuntimeError(
                f"the model's parameters are {str(now[0])[6:]} on {now[1]}, and were {str(then[0])[6:]} on {then[1]} "
                "when training began, as what the optimizer remembers is: convert or move the model first, and make "
                "the optimizer then"
            )

    def follow(self, state: State, share: float) -> None:
        """Takes the weights of a step in, as this share of the average."""
        torch._foreach_lerp_(self.values(state), [wide(p) for p in self.parameters], share)
        if pairs := self._statistics(_KEY):
            averages, now = zip(*pairs, strict=True)
            torch._foreach_lerp_(averages, now, share)

    def keep(self, state: State) -> None:
        """Keeps the average as it is now, to go back to."""
        self._norms = None
        copy_parts(self.before(state), self.values(state))
        for (average, now), (before, _) in zip(self._statistics(_KEY), self._statistics(_BEFORE), strict=True):
            average.copy_(torch.where(average.isfinite(), average, now))  # one bad batch is forgotten
            before.copy_(average)

    def restore(self, state: State) -> None:
        """Sends the weights, and their average, back to what was kept of it."""
        before = self.before(state)
        copy_parts([p.detach() for p in self.parameters], before)
        copy_parts(self.values(state), before)
        for (average, now), (kept, _) in zip(self._statistics(_KEY), self._statistics(_BEFORE), strict=True):
            now.copy_(kept)
            average.copy_(kept)

    def exchange(self, state: State) -> None:
        """Puts the average in the place of the weights, or the weights back in theirs."""
        if not self.is_in_place:
            self._norms = None
        self.is_in_place = not self.is_in_place
        for average, p in zip(self.values(state), self.parameters, strict=True):
            weights = p.clone()
            p.copy_(state[p].pop(_DISPLACED, average))
            if average.dtype == p.dtype:
                average.copy_(weights)
            elif self.is_in_place:  # it has digits that weights have no room for
                state[p][_DISPLACED] = weights
        for average, now in self._statistics(_KEY):
            before = now.clone()
            now.copy_(average)
            average.copy_(before)

    def restore_digits(self, state: State, saved: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Gives averages the digits back that torch takes from them when it loads a state: as many as weights have.

        Args:
            state: the optimizer's, loaded.
            saved: what was loaded, by the parameter that it is of.
        """
        for p, memory in saved.items():
            if p.dtype in SINGLE and _KEY in memory:
                state[p][_KEY] = wide(memory[_KEY].detach()).to(p.device, copy=True)

    def _kept(self, state: State, key: str) -> list[Tensor]:
        """What is kept of each parameter; at first itself."""
        memories = [state[p] for p in self.parameters]
        for memory, p in zip(memories, self.parameters, strict=True):
            if key not in memory:
                with torch.inference_mode(False):  # one that was made under inference_mode() could not be written later
                    for kept, value in ((_KEY, wide(p)), (_BEFORE, p)):
                        memory.setdefault(kept, value.detach().clone(memory_format=torch.preserve_format))
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

    def state_dict(self) -> dict[str, Any]:
        """What the optimizer's state does not hold."""
        statistics = {key: [average.clone() for average in kept] for key, kept in self._of_statistics.items()}
        return {"is_in_place": self.is_in_place, "statistics": statistics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.is_in_place = state["is_in_place"]
        kept = state.get("statistics", {})
        self._of_statistics = {key: [average.clone() for average in averages] for key, averages in kept.items()}


def go_towards(weights: Sequence[Tensor], average: Sequence[Tensor], part: float) -> None:
    """Moves weights a part of the way to their average, in place."""
    ways = [wide(w) for w in weights]  # themselves, where they are not in half precision
    torch._foreach_lerp_(ways, list(average), part)
    for w, way in zip(weights, ways, strict=True):
        if way is not w:
            w.copy_(way)
