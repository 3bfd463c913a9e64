"""What a rule is, what it is told, and where its sums go."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from newton_summary.measure.rules.jets import Groups, Jet

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
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    out: Any
    jets: dict[Place, Jet]
    third: bool = False

    def argument(self, place: Place) -> Any:
        """An argument by its place."""
        return self.args[place] if isinstance(place, int) else self.args[place[0]][place[1]]

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


class Sums:
    """The sums over all operations, in float64.

    Args:
        size: the number of groups.
        device: where the sums are.
        third: whether the diagonal of the third order is summed.
        full: whether all of the third order is.
    """

    def __init__(self, size: int, device: torch.device, third: bool = False, full: bool = False) -> None:
        def zeros(dims: int) -> Tensor:
            return torch.zeros((size,) * dims, dtype=torch.float64, device=device)

        self._half = zeros(2)
        self.diagonal = zeros(1) if third else None
        self._third = zeros(3) if full else None

    @property
    def hessian(self) -> Tensor:
        """H̄, shape (S, S)."""
        return self._half + self._half.T

    @property
    def third(self) -> Tensor:
        """All of D^(3), shape (S, S, S)."""
        assert self._third is not None
        one = self._third
        return one + one.permute(1, 0, 2) + one.permute(1, 2, 0)

    def add_cross(self, left: Groups, right: Groups, values: Tensor) -> None:
        """Adds mixed second derivatives that two different arguments give: (left, right), and their transpose."""
        _at(self._half, (left, right)).add_(values) if _are_runs(left, right) else self._half.index_put_(
            (index(left, values.device)[:, None], index(right, values.device)), values.double(), accumulate=True
        )

    def add_square(self, groups: Groups, values: Tensor) -> None:
        """Adds symmetric second derivatives (groups, groups)."""
        self.add_cross(groups, groups, values.double() / 2)

    def add_diagonal(self, groups: Groups, values: Tensor) -> None:
        """Adds third derivatives of single groups."""
        assert self.diagonal is not None
        self.diagonal.index_add_(0, index(groups, values.device), values.double())

    def add_third(self, one: Groups, pair: Groups, values: Tensor) -> None:
        """Adds a third of the symmetric sum: entries (one, pair, pair), symmetric in the pair."""
        assert self._third is not None
        device = values.device
        place = (index(one, device)[:, None, None], index(pair, device)[:, None], index(pair, device))
        self._third.index_put_(place, values.double(), accumulate=True)


class Rule(ABC):
    """What an operation does to tangents, and what its curvature adds to the sums."""

    kind: str

    @abstractmethod
    def takes(self, places: set[Place]) -> bool:
        """Whether it knows what to do where these arguments move."""

    @abstractmethod
    def is_curved(self, call: Call) -> bool:
        """Whether it adds to the sums, and so needs the adjoint."""

    @abstractmethod
    def push(self, call: Call, adjoint: Any, sums: Sums) -> Any:
        """The tangents of the result; adds v̄ · f'' and v̄ · f''' to the sums."""


@functools.lru_cache(maxsize=4096)
def index(groups: Groups, device: torch.device) -> Tensor:
    """Group numbers as a tensor."""
    return torch.tensor(groups, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=4096)
def _run(groups: Groups) -> slice | None:
    if groups == tuple(range(groups[0], groups[0] + len(groups))):
        return slice(groups[0], groups[0] + len(groups))
    return None


def _are_runs(*several: Groups) -> bool:
    return all(_run(groups) is not None for groups in several)


def _at(tensor: Tensor, several: tuple[Groups, ...]) -> Tensor:
    return tensor[tuple(_run(groups) for groups in several)]
