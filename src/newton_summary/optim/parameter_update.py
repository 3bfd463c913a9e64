"""The step of the weights, θ ← θ − λ_1 η_s u, once its rates are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from newton_summary.optim import directions
from newton_summary.optim.directions import Direction, Groups, State
from newton_summary.parallel.sharding import sharded_like
from newton_summary.partition import Partition


class ParameterUpdate:
    """Steps along a direction by the rates of the groups of a partition.

    Args:
        partition: the groups.
        direction: where u comes from.
    """

    def __init__(self, partition: Partition, direction: Direction) -> None:
        self.partition = partition
        self.direction = direction
        self._whole: dict[Tensor, float] = {}  # η for every parameter of one group
        self._split: dict[Tensor, Tensor] = {}  # and entry by entry for those that are split between groups
        self._sizes: tuple[list[float], dict[Tensor, float]] = [], {}  # λ_1, and λ_1 η for every whole parameter

    def set_rates(self, rates: Tensor) -> None:
        """Sets η, shape (S,)."""
        factors = dict(zip(self.partition.parameters, self.partition.spread(rates.tolist()), strict=True))
        self._whole = {p: f for p, f in factors.items() if not isinstance(f, Tensor)}
        self._split = {p: f for p, f in factors.items() if isinstance(f, Tensor)}
        self._sizes = [], {}

    @property
    def is_direct(self) -> bool:
        """Whether the direction can take the step by itself, without a tensor for u."""
        return not self._split and directions.descends(self.direction)

    def directly(self, groups: Groups, state: State, scales: list[float]) -> None:
        """Takes the step where :attr:`is_direct`, and the direction on with it.

        Args:
            groups: the optimizer's.
            state: the optimizer's.
            scales: λ_1, for each of the optimizer's groups.
        """
        assert directions.descends(self.direction)
        self.direction.descend(groups, state, self._sizes_of_steps(groups, scales))

    def along(self, u: Mapping[Tensor, Tensor], groups: Groups, scales: list[float]) -> None:
        """Takes the step of the parameters that have a direction."""
        sizes = self._sizes_of_steps(groups, scales)
        for p, direction in u.items():
            if p in sizes:
                p.sub_(direction, alpha=sizes[p])
        scale = by_parameter(groups, scales) if self._split else {}
        for p, factor in self._split.items():
            if p in u:
                p.addcmul_(u[p], sharded_like(factor, p), value=-scale[p])

    def _sizes_of_steps(self, groups: Groups, scales: list[float]) -> dict[Tensor, float]:
        """λ_1 η for every parameter that is not split between groups; found again where λ_1 or η have changed."""
        if self._sizes[0] != scales:
            scale = by_parameter(groups, scales)
            self._sizes = scales, {p: f * scale[p] for p, f in self._whole.items()}
        return self._sizes[1]


def by_parameter(groups: Groups, scales: Sequence[float]) -> dict[Tensor, float]:
    """For each parameter what there is for each of the optimizer's groups."""
    return {p: scale for group, scale in zip(groups, scales, strict=True) for p in group["params"]}
