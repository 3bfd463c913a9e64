"""What a rule is, what it is told, and where its sums go."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.rules.call import Call, Place
from newton_summary.measure.rules.derive import Local
from newton_summary.measure.rules.jets import Groups, blocks


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

        self.size = size
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
        self._add(left, right, values, 1.0)

    def add_square(self, groups: Groups, values: Tensor) -> None:
        """Adds symmetric second derivatives (groups, groups)."""
        self._add(groups, groups, values, 0.5)

    def _add(self, left: Groups, right: Groups, values: Tensor, factor: float) -> None:
        rows, columns = _run(left), _run(right)
        if rows is not None and columns is not None:
            self._half[rows, columns].add_(values, alpha=factor)
        else:
            place = (index(left, values.device)[:, None], index(right, values.device))
            self._half.index_put_(place, factor * values.double(), accumulate=True)

    def add_diagonal(self, groups: Groups, values: Tensor) -> None:
        """Adds third derivatives of single groups."""
        assert self.diagonal is not None
        run = _run(groups)
        if run is not None:
            self.diagonal[run].add_(values)
        else:
            self.diagonal.index_add_(0, index(groups, values.device), values.double())

    def add_third(self, one: Groups, two: Groups, three: Groups, values: Tensor) -> None:
        """Adds to one of the three terms that :attr:`third` is made of, which is symmetric in the last two groups."""
        assert self._third is not None
        device = values.device
        place = (index(one, device)[:, None, None], index(two, device)[:, None], index(three, device))
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

    def sources(self, call: Call, adjoint: Any) -> dict[Place, tuple[Groups, Tensor]]:
        """The rows v̄ · f''[ẋ_i, ·]: what the adjoints of the arguments gain as group i's rate moves."""
        local = Local(call)
        rows = local.bent(local.gradient(adjoint))
        return {place: (local.first, row) for place, row in zip(local.places, rows, strict=True)}

    def add_third(self, call: Call, adjoint: Any, moving: Any, groups: Groups, sums: Sums) -> None:
        """Adds v̄̇_i · f''[ẋ_j, ẋ_k] and a third of v̄ · f‴[ẋ_i, ẋ_j, ẋ_k], for some groups i.

        Args:
            call: the operation.
            adjoint: v̄, or nothing.
            moving: v̄̇_i, a row for each of ``groups``, or nothing.
            groups: the groups i.
            sums: where it goes.
        """
        local = Local(call)
        gradient = None if adjoint is None else local.gradient(adjoint)
        for row, group in enumerate(groups):
            values = []
            if moving is not None:
                weights = moving[row] if isinstance(moving, Tensor) else [m if m is None else m[row] for m in moving]
                values.append(local.gram(local.bent(local.gradient(weights))))
            if gradient is not None and group in local.first:
                values.append(local.gram(local.twisted(gradient, local.first.index(group))) / 3)
            for value in values:
                sums.add_third((group,), local.first, local.first, value.unsqueeze(0))


def add_cubes(weights: Tensor, dot: Tensor, groups: Groups, first: Groups, sums: Sums) -> None:
    """Adds Σ a_i ẋ_j ẋ_k over all entries, in blocks that fit a cache.

    Of every pair j, k only one order is computed, but for those within one of a few parts of the groups.

    Args:
        weights: a_i, a row for each of ``groups``.
        dot: ẋ_j, a row for each of ``first``.
        groups: the groups i.
        first: the groups j and k.
        sums: where it goes.
    """
    m, n = len(weights), len(dot)
    total = dot.new_zeros(m, n, n)
    part = -(-n // 6)
    for block in blocks(dot.shape[1], m * part):
        x, a = dot[:, block], weights[:, None, block]
        for start in range(0, n, part):
            end = min(start + part, n)
            products = (a * x[start:end]).flatten(0, 1) @ x[:end].T
            total[:, start:end, :end] += products.view(m, end - start, end)
    sums.add_third(groups, first, first, total.tril() + total.tril(-1).mT)


@functools.lru_cache(maxsize=4096)
def index(groups: Groups, device: torch.device) -> Tensor:
    """Group numbers as a tensor."""
    return torch.tensor(groups, dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=4096)
def _run(groups: Groups) -> slice | None:
    if groups == tuple(range(groups[0], groups[0] + len(groups))):
        return slice(groups[0], groups[0] + len(groups))
    return None
