"""A loss as it was recorded, run again a little to either side of where it was measured (docs/engine.md).

Everything that counts as a constant stays as it was: what was detached, drawn or decided.  So a gradient that is
another one by intention is that of what is run here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.differences import (
    DISTANCES,
    DOUBLE,
    KINKED_BY_DOUBLE,
    QUICK,
    SINGLE_BY_DOUBLE,
    Differences,
    Precision,
    Slope,
    rates,
    ratio,
)
from newton_summary.measure.graph import Graph
from newton_summary.measure.loss import gradients_of
from newton_summary.measure.record import Leaf
from newton_summary.measure.request import Request
from newton_summary.partition import Partition

_ROUNDINGS = 32  # units in the last place of a loss: what they make of a slope is within its tolerance
_SHORTEST = 1e-3  # of the usual step: a loss that is near 0 by itself tells nothing of its rounding

_WIDE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def differentiable(
    graph: Graph, inputs: Sequence[Tensor], partition: Partition, constants: Sequence[Any] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """The loss of recorded operations at some inputs, and the parameters to differentiate it by."""
    parameters = [p.detach() for p in partition.parameters]
    fresh = [tensor.detach() for tensor in inputs]
    for tensor, (_, _, number) in zip(fresh, graph.inputs, strict=True):
        if number is not None:
            parameters[number] = tensor.requires_grad_()
    return graph.run(fresh, constants=constants)[graph.result], parameters


class RecordedLine:
    """A recorded loss with all groups moved along the direction, each at its rate.

    Args:
        graph: the loss.
        leaves: of a recording.
        request: what is measured.
        values: those of the graph there.  Default: they are computed anew, in double precision where that can be.
        size: of the terms of the slope that is expected: no step is longer than it takes to tell.
    """

    def __init__(
        self,
        graph: Graph,
        leaves: Sequence[Leaf],
        request: Request,
        values: Sequence[Any] | None = None,
        size: float = 0.0,
    ) -> None:
        self._leaves, self._request = leaves, request
        self._is_wide = values is None and graph.coarsest == torch.float32
        self.graph = self._in_double(graph) if self._is_wide else graph
        self.precision = self._precision()
        self._step = self.precision.step * ratio(request.partition.parameters, request.direction)
        self._factors = request.partition.spread(rates(len(request.partition)))
        with torch.no_grad():
            self.here = self.graph.run([i() for i in self._inputs(0)]) if values is None else values
        self._step = min(self._step, max(self._telling(size), _SHORTEST * self._step))

    def _telling(self, size: float) -> float:
        """How long a step is that changes the loss by enough for differences to tell, whatever rounding does to it.

        Along a gradient the loss of a large model bends soon: it moves by as much as it has within some thousandths of
        the parameters' length.
        """
        loss = abs(self.here[self.graph.result].item())
        return _ROUNDINGS * self.precision.eps / self.precision.slope * loss / size if size > 0 else math.inf

    def _precision(self) -> Precision:
        if self._is_wide:
            return KINKED_BY_DOUBLE if self.graph.kinked else SINGLE_BY_DOUBLE
        return DOUBLE if self.graph.coarsest == torch.float64 else QUICK

    def _in_double(self, graph: Graph) -> Graph:
        instructions = [replace(i, args=_wide(i.args), kwargs=_wide(i.kwargs)) for i in graph.instructions]
        return replace(graph, instructions=instructions, constants=[(s, _wide(t)) for s, t in graph.constants])

    def _widened(self, tensor: Tensor) -> Tensor:
        return _wide(tensor) if self._is_wide else tensor

    def _inputs(self, k: int) -> list[Callable[[], Tensor]]:
        """What gives each input some steps along the line."""
        return [partial(self._input, leaf, number, k) for _, leaf, number in self.graph.inputs]

    def _input(self, leaf: int, number: int | None, k: int) -> Tensor:
        tensor = self._widened(self._leaves[leaf].tensor.detach())
        if number is None:
            return tensor
        u, factor = self._widened(self._request.direction[number]), self._factors[number]
        if isinstance(factor, Tensor):
            return torch.addcmul(tensor, u, self._widened(factor), value=k * self._step)
        return torch.add(tensor, u, alpha=k * self._step * factor)

    def values(self, k: int, whole: bool = True) -> list[Any]:
        """Every value some steps along the line, by slot; the loss alone if so wanted."""
        with torch.no_grad():
            return self.graph.run(self._inputs(k), constants=self.here, whole=whole)

    def slope(self, distances: Sequence[int] = DISTANCES) -> Slope:
        """The slope of the loss, by differences at some distances."""
        losses = {0: self.here[self.graph.result].item()}
        for k in _both_sides(distances):
            losses[k] = self.values(k, whole=False)[self.graph.result].item()
        return Slope(losses, self._step, self.precision)

    def differences(self) -> Differences:
        """Differences of the gradient."""
        losses, slopes = {}, {}
        for k in (0, *_both_sides(DISTANCES)):
            losses[k], slopes[k] = self._slopes(k)
        return Differences(losses, slopes, self._step, self.precision)

    def _slopes(self, k: int) -> tuple[float, Tensor]:
        """The loss, and every group's slope."""
        partition, inputs = self._request.partition, [i() for i in self._inputs(k)]
        value, parameters = differentiable(self.graph, inputs, partition, self.here)
        gradient = gradients_of(value, parameters)
        along = [self._widened(u) for u in self._request.direction]
        return value.item(), torch.stack(partition.dot(gradient, along)).double()


def _both_sides(distances: Sequence[int]) -> Iterator[int]:
    for k in distances:
        yield from (k, -k)


def _wide(value: Any) -> Any:
    """A tensor in double precision, or arguments that ask for it where they asked for single."""
    if isinstance(value, Tensor):
        return value.to(_WIDE.get(value.dtype, value.dtype))
    if isinstance(value, torch.dtype):
        return _WIDE.get(value, value)
    if isinstance(value, list | tuple):
        return [_wide(v) for v in value] if isinstance(value, list) else tuple(_wide(v) for v in value)
    if isinstance(value, dict):
        return {k: _wide(v) for k, v in value.items()}
    return value
