"""Which Kronecker factors are affordable: by a count of operations, so that nothing is set and runs repeat."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from newton_summary.measure.price import CALL, GRADIENT, Price
from newton_summary.optim.directions.soap import SOAP, Sides, matrix_shape
from newton_summary.parallel.processes import Processes

SHARE = 0.2  # of a training step without them, for all factors together
_FEWEST = 2, 0.25  # sides, and of all: for less, the one kernel that a step without factors takes is worth more
_LONGEST = 2  # times the rows that a layer sees: the length of a side with a factor
_CALLS = 2  # whose time a side takes in a step: three products without autograd, and a part of a refresh
_CALLS_OF_OPERATION = 2  # of the loss, in a training step: one more on the way back
_CALLS_OF_TENSOR = 3  # the same of the optimizer
_PRODUCTS = 6.5  # multiply-adds of a side, in n² for each entry of the other one: 2 in its factor, 4 to turn and back
_BASIS = 6  # the same of a refresh, in n³
_FUSED = ("rnn", "lstm", "gru")  # operations that no registry counts


class Work(Price):
    """Counts a loss as :class:`Price` does, and the rows that each matrix among the parameters meets.

    A row is what a layer applies its matrix to: a sample, a position of a convolution, a step in time.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self.rows: defaultdict[int, float] = defaultdict(float)  # by the number of the parameter
        self._numbers = {_place(p): n for n, p in enumerate(parameters) if p.dim() >= 2 and p.numel() > 0}
        self._parameters = parameters

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        result = out[0] if isinstance(out, (tuple, list)) and out else out
        if isinstance(result, Tensor):
            flat = [a for arg in args for a in (arg if isinstance(arg, (tuple, list)) else [arg])]
            for place in {_place(a) for a in flat if isinstance(a, Tensor)} - {_place(result)}:
                number = None if place is None else self._numbers.get(place)
                if number is not None:
                    self._meet(number, result, func)
        return out

    def _meet(self, number: int, result: Tensor, func: Any) -> None:
        parameter = self._parameters[number]
        rows = result.numel() / parameter.shape[0]
        self.rows[number] += rows
        if any(name in str(func) for name in _FUSED):
            self.operations += int(2 * rows * parameter.numel())


def _place(tensor: Tensor) -> tuple[int, int] | None:
    """The memory that a tensor lies in, and where; nothing for sparse ones, which lie in several places."""
    if tensor.layout is not torch.strided:
        return None
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def affordable_sides(
    allowed: Sequence[Sides], parameters: Sequence[Tensor], loss: Callable[[], object], refresh_every: int
) -> list[Sides]:
    """The sides of each parameter that are worth a factor: the cheapest first, up to a fifth of a training step.

    A side of n takes about n / rows of its layer's own operations.  So factors are nearly free on convolutions,
    recurrent layers and sequences, and dear on wide layers that see few samples; on the smallest networks, whose time
    goes into calls, there are few of them.  None is much longer than the rows: it would take twice what the layer
    itself takes, and what a batch tells of it is of lower rank.

    Args:
        allowed: the sides of each parameter that may have a factor at all.
        parameters: those that are trained, as they are during the loss.
        loss: evaluates the loss on a batch of the usual size.
        refresh_every: the number of steps between refreshes of the bases.
    """
    with Work(parameters) as work:
        loss()
    calls = _CALLS_OF_OPERATION * work.calls + _CALLS_OF_TENSOR * len(parameters)
    budget = SHARE * (calls * CALL + GRADIENT * work.operations)
    offers = []
    for number, (parameter, sides) in enumerate(zip(parameters, allowed, strict=True)):
        shape = matrix_shape(parameter) if any(sides) else (0, 0)
        for axis, (n, other) in enumerate((shape, shape[::-1])):
            if sides[axis] and n <= _LONGEST * work.rows[number]:
                price = _PRODUCTS * n * n * other + _BASIS * n**3 / refresh_every + _CALLS * CALL
                own = 2 * GRADIENT * work.rows[number] * n * other
                offers.append((price / own, number, axis, price))
    chosen = [[False, False] for _ in parameters]
    for _, number, axis, price in sorted(offers):
        if price <= budget:
            budget -= price
            chosen[number][axis] = True
    if sum(map(sum, chosen)) < max(_FEWEST[0], _FEWEST[1] * sum(map(sum, allowed))):
        return [Sides(False, False) for _ in parameters]
    return [Sides(*pair) for pair in chosen]


class SidesByCount:
    """The choice of the sides of a SOAP direction, made at the first evaluation of a loss.

    Args:
        direction: whose sides are chosen.
        parameters: those that are trained.
    """

    def __init__(self, direction: SOAP, parameters: Sequence[Tensor]) -> None:
        self.direction = direction
        self.parameters = parameters

    def choose(self, whole: Sequence[Tensor], loss: Callable[[], float], processes: Processes) -> float:
        """Evaluates the loss, and chooses; all processes choose the same.

        Args:
            whole: the parameters as they are during the loss.
            loss: evaluates it.
            processes: those that train together.

        Returns:
            The loss.
        """
        found: list[float] = []
        allowed = [self.direction.sides_of(p) for p in self.parameters]
        every = self.direction.refresh_every
        sides = affordable_sides(allowed, whole, lambda: found.append(loss()), every)
        flags = [float(flag) for pair in sides for flag in pair]
        agreed = [flag > 0.5 for flag in processes.mean(flags, [1] * len(flags), self.parameters[0].device)]
        self._set(list(zip(agreed[::2], agreed[1::2], strict=True)))
        return found[0]

    def _set(self, sides: Sequence[Sequence[bool]]) -> None:
        self.direction.sides = dict(zip(self.parameters, (Sides(*pair) for pair in sides), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The sides of each parameter, where they were chosen."""
        sides = self.direction.sides
        return {"sides": None if sides is None else [list(sides[p]) for p in self.parameters]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        if state["sides"] is not None:
            self._set(state["sides"])
