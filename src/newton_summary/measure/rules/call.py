"""One operation of a graph, at work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from newton_summary.measure.arena import empty
from newton_summary.measure.rules.jets import Jet, may_hold

Place: TypeAlias = int | tuple[int, int]
"""Which argument of a call: its position, or its position and that in a list."""


@dataclass(slots=True)
class Call:
    """One operation of a graph, at work.

    Args:
        op: the operation.
        args: its arguments.
        kwargs: its keyword arguments.
        out: what it gave: a tensor, or several.
        jets: the tangents of those arguments that move.
        third: whether the diagonal of the third order is wanted.
        bent: those arguments that a curved operation leads to, so that their adjoints' tangents matter.
        spare: those arguments whose tangents nobody else will read, so that they may be overwritten.
        kept: what a rule keeps for itself from one part of the third order to the next.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any
    jets: dict[Place, Jet]
    third: bool = False
    bent: frozenset[Place] = frozenset()
    spare: frozenset[Place] = frozenset()
    kept: dict[Any, Tensor] = field(default_factory=dict)

    def argument(self, place: Place) -> Any:
        """An argument by its place."""
        return self.args[place] if isinstance(place, int) else self.args[place[0]][place[1]]

    def target(self, count: int) -> Tensor:
        """A tensor for so many rows of the result: those of the only argument, where they fit and are spare."""
        jet, like = self.jets[0], self.out if isinstance(self.out, Tensor) else self.out[0]
        if 0 in self.spare and jet.rows.shape == (count, *like.shape) and may_hold(jet.rows, like):
            return jet.rows
        return empty((count, *like.shape), like)

    def with_arguments(self, new: Mapping[Place, Any]) -> Any:
        """The operation applied to other arguments."""
        args = list(self.args)
        for place, value in new.items():
            if isinstance(place, int):
                args[place] = value
            else:
                items = list(args[place[0]])
                items[place[1]] = value
                args[place[0]] = items
        return self.op(*args, **self.kwargs)
