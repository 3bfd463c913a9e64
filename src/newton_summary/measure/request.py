"""What is asked of a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_summary.measure.gradient import GradientAlong
from newton_summary.measure.rules import Groups, Jet
from newton_summary.partition import Partition
from newton_summary.summary import Summary


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for."""

    partition: Partition
    direction: Sequence[Tensor]
    order: int
    third: str

    @property
    def gradients(self) -> GradientAlong:
        """Finds gradients along the direction."""
        return GradientAlong(self.partition, self.direction)

    @property
    def diagonal(self) -> bool:
        """Whether the third order's diagonal is wanted."""
        return self.order == 3 and self.third == "diagonal"

    @property
    def full(self) -> bool:
        """Whether all of the third order is wanted."""
        return self.order == 3 and self.third == "full"

    @property
    def at_once(self) -> int:
        """How many groups' tangents an entry needs at the same time."""
        return 3 if self.full else min(self.order, 2)

    @property
    def kind(self) -> tuple[int, str]:
        """What is asked for, whatever the direction."""
        return self.order, self.third

    def jet(self, parameter: int, wanted: Groups) -> Jet | None:
        """A parameter's tangents by some groups: u, split by groups."""
        label, u = self.partition.labels[parameter], self.direction[parameter]
        here = tuple(g for g in self.partition.groups_of[parameter] if g in wanted)
        if not here:
            return None
        rows = (
            u.unsqueeze(0)
            if isinstance(label, int)
            else torch.stack([torch.where(label.to(u.device) == g, u, 0.0) for g in here])
        )
        return Jet((), here, rows.detach())

    def undefined(self, loss: Tensor, weight: float) -> Summary:
        """What there is of a loss that is not finite: it has no derivatives."""
        size, device = len(self.partition), self.partition.device

        def nothing(order: int) -> Tensor:
            return torch.full((size,) * order, torch.nan, dtype=torch.float64, device=device)

        return Summary(
            loss=loss,
            gradient=nothing(1),
            hessian=nothing(2) if self.order > 1 else None,
            third=nothing(3 if self.full else 1) if self.order > 2 else None,
            names=self.partition.names,
            weight=weight,
        )

    def part_bytes(self) -> int:
        """The bytes of a group's tangents of parameters that are split between groups, on average, rounded up."""
        pairs = zip(self.partition.labels, self.partition.groups_of, self.direction, strict=True)
        total = sum(len(groups) * u.nbytes for label, groups, u in pairs if not isinstance(label, int))
        return -(-total // len(self.partition))
