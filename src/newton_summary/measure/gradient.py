"""A gradient, of which no more is kept than is compared.

Where parameters are whole for a moment only (:mod:`newton_summary.parallel.paging`), so are gradients by them: each is
taken as the backward pass finds it, its inner product with the direction is noted, and this process keeps its part.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.autograd import nodes
from newton_summary.measure.differences import rates
from newton_summary.measure.loss import gradients_of
from newton_summary.parallel import paging
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

        return self.taken(value, found, dict(enumerate(parameters)), create_graph)

    def taken(
        self,
        value: Tensor,
        find: Callable[[], Mapping[int, Tensor | None]],
        leaves: Mapping[int, Tensor],
        create_graph: bool = False,
    ) -> Gradient:
        """The gradient that a backward pass finds.

        Args:
            value: what it begins with.
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
            part, known = paging.part_of(leaves[number], gradient.detach()), parts[number]
            parts[number] = part if known is None else known + part

        _visit(value, find, leaves, take)
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


_VIEWS = {"TBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0", "UnsqueezeBackward0"}
"""What a parameter goes through on its way into products; backward, too, it is a way of looking at memory."""


@dataclass(frozen=True)
class _Way:
    """How the gradient of a value becomes that of a parameter, by its number: through the functions of some views."""

    number: int
    views: tuple[Any, ...] = ()

    def back(self, gradient: Tensor) -> Tensor:
        for view in self.views:
            gradient = view(gradient)
        return gradient


def _visit(
    value: Tensor,
    find: Callable[[], Mapping[int, Tensor | None]],
    leaves: Mapping[int, Tensor],
    take: Callable[[int, Tensor], None],
) -> None:
    """Hands each term of each gradient of a backward pass over as it is found, and keeps none.

    Autograd would add up the terms of a gradient, and of all gradients at once where a gradient is differentiated: each
    has one term from where its parameter is used forward, and one from where it is used backward.
    """
    numbers = {id(leaf): number for number, leaf in leaves.items()}
    taken: set[int] = set()

    def way_from(node: Any) -> _Way | None:
        number = numbers.get(id(getattr(node, "variable", None)))
        if number is not None:
            return _Way(number)
        if type(node).__name__ not in _VIEWS or node.next_functions[0][0] is None:
            return None
        way = way_from(node.next_functions[0][0])
        return None if way is None else _Way(way.number, (node, *way.views))

    def hook(ways: Mapping[int, _Way], gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        for place, way in ways.items():
            gradient = gradients[place]
            if gradient is not None:
                take(way.number, way.back(gradient))
                taken.add(way.number)
        return tuple(None if place in ways else gradient for place, gradient in enumerate(gradients))

    with contextlib.ExitStack() as hooks:
        for node in nodes(value):
            following = enumerate(node.next_functions)
            ways = {place: way for place, (n, _) in following if n is not None and (way := way_from(n)) is not None}
            if ways and way_from(node) is None:
                handle = node.register_hook(lambda gradients, _, ways=ways: hook(ways, gradients))
                hooks.callback(handle.remove)
        found = find()
    for number, gradient in found.items():
        if gradient is not None and number not in taken:  # a parameter that is the loss
            take(number, gradient)
