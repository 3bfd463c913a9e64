"""A gradient, of which no more is kept than is compared.

Where parameters are whole for a moment only (:mod:`newton_summary.measure.paging`), so are gradients by them: each is
taken as the backward pass finds it, its inner product with the direction is noted, and this process keeps its part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_summary.measure import paging
from newton_summary.measure.differences import rates
from newton_summary.measure.loss import gradients_of
from newton_summary.partition import Partition


@dataclass(frozen=True)
class Gradient:
    """A gradient by the parameters of a partition.

    Attributes:
        parts: for each parameter the gradient, or this process's part of it; nothing where the loss has none.
        along: its inner products with the direction, S scalars; nothing where they follow from the parts.
        turning: these, each times its group's rate, with the graph that autograd made; nothing likewise.
    """

    parts: Sequence[Tensor | None]
    along: Sequence[Tensor] | None = None
    turning: Tensor | None = None

    def detached(self) -> Gradient:
        """The same without its graph."""
        return Gradient([None if g is None else g.detach() for g in self.parts], self.along)


class GradientAlong:
    """Finds gradients, and their derivative along the line on which every group moves at a rate of its own.

    Args:
        partition: S groups.
        direction: u, one tensor for each parameter of the partition.
    """

    def __init__(self, partition: Partition, direction: Sequence[Tensor]) -> None:
        self._partition, self._direction = partition, direction

    def slopes(self, gradient: Gradient) -> Sequence[Tensor]:
        """Its inner products with the direction, S scalars."""
        return self._dot(gradient.parts) if gradient.along is None else gradient.along

    def of(self, value: Tensor, parameters: Sequence[Tensor], create_graph: bool = False) -> Gradient:
        """The gradient of a loss by the partition's parameters, or by what stands for them."""

        def found() -> Mapping[int, Tensor | None]:
            return dict(enumerate(gradients_of(value, parameters, create_graph)))

        return self.taken(found, dict(enumerate(parameters)), create_graph)

    def taken(
        self, find: Callable[[], Mapping[int, Tensor | None]], leaves: Mapping[int, Tensor], create_graph: bool = False
    ) -> Gradient:
        """The gradient that a backward pass finds.

        Args:
            find: takes the pass, and gives the gradients by the numbers of their parameters.
            leaves: what it differentiates by.
            create_graph: whether it can be differentiated again.
        """
        count = len(self._direction)
        if not paging.is_active():
            found = find()
            return Gradient([found.get(number) for number in range(count)])
        parts: list[Tensor | None] = [None] * count
        along = self._dot(parts)
        turning: list[Tensor] = []

        def take(number: int, gradient: Tensor) -> None:
            slopes = self._dot([gradient if n == number else None for n in range(count)])
            along[:] = [total + slope.detach() for total, slope in zip(along, slopes, strict=True)]
            turning.extend(s * f for s, f in zip(slopes, self._rates, strict=True) if s.requires_grad)
            parts[number] = paging.part_of(leaves[number], gradient.detach())

        _visit(find, leaves, take)
        return Gradient(parts, along, torch.stack(turning).sum() if create_graph and turning else None)

    def hessian_rows(self, gradient: Gradient, parameters: Sequence[Tensor]) -> Tensor:
        """H̄ times the groups' rates, shape (S,), from a gradient with its graph, by these parameters."""
        partition = self._partition
        if paging.is_active():
            turning = gradient.turning
            rows = self._dot([None] * len(parameters)) if turning is None else self.of(turning, parameters).along
            assert rows is not None
            return torch.stack(list(rows))
        moves = [u * f for u, f in zip(self._direction, partition.spread(self._rates), strict=True)]
        pairs = [(g, u) for g, u in zip(gradient.parts, moves, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros(len(partition), dtype=torch.float64, device=partition.device)
        product = gradients_of([g for g, _ in pairs], parameters, along=[u for _, u in pairs])
        return torch.stack(self._dot(product))

    @property
    def _rates(self) -> Sequence[float]:
        return rates(len(self._partition))

    def _dot(self, gradient: Sequence[Tensor | None]) -> list[Tensor]:
        return self._partition.dot(gradient, self._direction)


def _visit(
    find: Callable[[], Mapping[int, Tensor | None]], leaves: Mapping[int, Tensor], take: Callable[[int, Tensor], None]
) -> None:
    """Hands each gradient of a backward pass over as it is found, and keeps none."""
    taken: set[int] = set()

    def hook(number: int, gradient: Tensor) -> Tensor:
        take(number, gradient)
        taken.add(number)
        return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

    with contextlib.ExitStack() as hooks:
        for number, leaf in leaves.items():
            if leaf.requires_grad:
                handle = leaf.register_hook(lambda gradient, number=number: hook(number, gradient))
                hooks.callback(handle.remove)
        found = find()
    for number, gradient in found.items():
        if gradient is not None and number not in taken:  # one that the loss has frozen after its use
            take(number, gradient)
